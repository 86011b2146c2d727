"""Set before torch is imported: one thread a process, so that eight ranks share two cores in peace."""

import os
from collections import Counter
from pathlib import PurePosixPath

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of each folder, set-up and all: where a change has to move something out, and what it added."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[str(PurePosixPath(report.nodeid.split("::")[0]).parent)] += report.duration
    terminalreporter.section("seconds per folder")
    for folder, took in seconds.most_common():
        terminalreporter.write_line(f"{took:7.1f}  {folder}")
    terminalreporter.write_line(f"{sum(seconds.values()):7.1f}  in all")
