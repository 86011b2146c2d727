"""Pictures of one and several runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from paralign.engine.cli import app
from paralign.engine.observe.metrics import JsonLines
from paralign.engine.observe.plot import plot_runs
from paralign.models.errors import ParalignError


def run_dir(path: Path, *, validation: bool) -> Path:
    lines = JsonLines(path, 0)
    for step in range(5):
        lines.log(step, {"loss": 2.0 / (step + 1)})
    if validation:
        lines.log(0, {"validation/chat/loss": 2.5, "validation/code/loss": 1.5})
        lines.log(4, {"validation/chat/loss": 2.0, "validation/code/loss": float("nan")})
    lines.close()
    return path


def test_runs_become_a_picture(tmp_path: Path) -> None:
    runs = [run_dir(tmp_path / "a", validation=True), run_dir(tmp_path / "b", validation=False)]
    result = CliRunner().invoke(app, ["plot", *map(str, runs), "-o", str(tmp_path / "out/loss.png")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_a_loss_are_refused(tmp_path: Path) -> None:
    JsonLines(tmp_path / "a", 0).close()
    with pytest.raises(ParalignError, match="holds no loss yet"):
        plot_runs([tmp_path / "a"], tmp_path / "out.png")
