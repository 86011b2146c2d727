"""One pool of forked ranks for all distributed tests of a run, and the certificate as a table at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .pool import RankPool
from .processes import Processes
from .reference import SAMPLE_SETS, make_reference

FIGURES = ("loss", "gradient", "grad_norm", "loss_after")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    torch.set_num_threads(1)
    with RankPool(8) as pool:
        yield pool


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts real processes, and ends with the test what is left of them."""
    with Processes(tmp_path / "log") as started:
        yield started


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of the reference of a family on a sample set; each is computed once."""
    folder = tmp_path_factory.mktemp("references")

    def make(family: str, samples: str = "plain") -> Path:
        path = folder / f"{family}-{samples}.pt"
        if not path.exists():
            torch.save(make_reference(family, SAMPLE_SETS[samples]), path)
        return path

    return make


class CertificateTable:
    """Names and rows of errors, for the table that the run ends with; a report carries them there as plain values."""

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties

    def append(self, line: tuple[str, Any]) -> None:
        name, row = line
        self._properties.append(("certificate", [name, *(getattr(row, what, None) for what in FIGURES)]))


@pytest.fixture
def certificate_table(request: pytest.FixtureRequest) -> CertificateTable:
    return CertificateTable(request.node.user_properties)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for key, value in report.user_properties
        if key == "certificate"
    ]
    if not rows:
        return
    terminalreporter.section(
        "layout certificate: relative errors against transformers, unpacked, one process"
    )
    width = max(len(name) for name, *_ in rows)
    terminalreporter.write_line(f"{'':{width}}     loss  gradient  grad norm  loss, 3 steps")
    for name, *errors in rows:
        cells = ["—" if error is None else f"{error:.1e}" for error in errors]
        terminalreporter.write_line(
            f"{name:{width}}  {cells[0]}   {cells[1]}    {cells[2]:>7}        {cells[3]:>7}"
        )
