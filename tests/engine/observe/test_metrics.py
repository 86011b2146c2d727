"""metrics.jsonl across resumes, and what a console shows."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from paralign.engine.observe.config import ObserveConfig
from paralign.engine.observe.metrics import ConsoleLog, JsonLines, MetricsLog, read_metrics
from paralign.models.errors import ParalignError, TrainingError


def losses(run_dir: Path) -> list[tuple[int, float | None]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir)]


def write(run_dir: Path, first_step: int, *values: float) -> None:
    lines = JsonLines(run_dir, first_step)
    for step, value in enumerate(values, start=first_step):
        lines.log(step, {"loss": value})
    lines.close()


def test_a_line_is_json_with_step_time_and_values(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "run", 0)
    lines.log(3, {"loss": 1.5, "validation/chat/loss": 2.0})
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())  # before it is closed: flushed
    assert line.pop("time") > 1.7e9
    assert line == {"step": 3, "loss": 1.5, "validation/chat/loss": 2.0}


def test_a_resumed_run_replaces_the_lines_it_writes_again(tmp_path: Path) -> None:
    write(tmp_path, 0, 5.0, 4.0, 3.0, 2.0)
    write(tmp_path, 2, 3.5)
    assert losses(tmp_path) == [(0, 5.0), (1, 4.0), (2, 3.5)]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 5.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    write(tmp_path, 1, 4.0)
    assert losses(tmp_path) == [(0, 5.0), (1, 4.0)]


def test_lines_that_are_not_of_a_run_are_told_and_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 0, 5.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"loss": 2}\n\xff{"step"')
    lines = JsonLines(tmp_path, 1)
    lines.start({})
    lines.log(1, {"loss": 4.0})
    assert losses(tmp_path) == [(0, 5.0), (1, 4.0)]
    assert "metrics.jsonl: lines 2, 3, 4: torn, or not of a run; moved to" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl.unread").read_bytes().count(b"\n") == 3


class FullDisk:
    """A sink on a full disk."""

    place = Path("runs/x/metrics.jsonl")

    def start(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = note = start

    def close(self) -> None:
        self.start()


@pytest.mark.parametrize(
    "write",
    [lambda log: log.start({}), lambda log: log.log(1, {}), lambda log: log.note(1, ""), MetricsLog.close],
)
def test_a_full_disk_is_one_error(write: Callable[[MetricsLog], None]) -> None:
    with pytest.raises(
        TrainingError, match=r"^runs/x/metrics\.jsonl: No space left on device; make room .* checkpoints stay"
    ):
        write(MetricsLog(FullDisk()))


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    write(tmp_path, 0, float("nan"), float("inf"))
    assert losses(tmp_path) == [(0, None), (1, None)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog.for_rank(
        1, tmp_path / "run", first_step=0, total_steps=2, config=ObserveConfig(), recipe=""
    )
    log.start({"model": "tiny"})
    log.log(0, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()


def test_a_directory_without_metrics_is_told(tmp_path: Path) -> None:
    with pytest.raises(ParalignError, match=r"metrics\.jsonl: No such file.*expected the directory of a run"):
        read_metrics(tmp_path)


def shown(terminal: bool, *reports: tuple[int, dict[str, float]]) -> str:
    text = io.StringIO()
    log = ConsoleLog(0, 10, Console(file=text, force_terminal=terminal, width=160, color_system=None))
    log.start({"model": "tiny [x]"})
    for step, values in reports:
        log.log(step, values)
    log.close()
    return text.getvalue()


def test_without_a_terminal_each_report_is_a_plain_line() -> None:
    text = shown(
        False,
        (0, {"validation/chat/loss": 3.25}),
        (0, {"loss": 2.0, "learning_rate": 1e-5, "grad_norm": 1.0}),
        (1, {"loss": 1.5, "tokens_per_second": 12345.0, "mfu": 0.456}),
    )
    assert "tiny [x]" in text
    lines = text.splitlines()[-3:]
    assert lines[0] == "step 0/10  validation/chat/loss 3.2500"
    assert lines[1] == "step 0/10  loss 2.0000  grad_norm 1.000  lr 1.00e-05"
    assert lines[2].startswith("step 1/10  loss 1.5000  12,345 tokens/s  MFU 45.6%  ETA 0:00:0")


def test_on_a_terminal_a_bar_holds_the_training_values_and_evaluations_stay() -> None:
    text = shown(True, (4, {"loss": 2.0}), (4, {"validation/chat/loss": 3.25}))
    assert "5/10" in text
    assert "loss 2.0000" in text
    assert "step 4  validation/chat/loss 3.2500" in text
