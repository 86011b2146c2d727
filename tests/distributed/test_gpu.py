"""One real run on a GPU: NCCL, bf16, packs through variable-length attention; stopped and resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paralign.engine.observe.metrics import read_metrics

from .toy import make_toy, write_recipe

pytestmark = pytest.mark.gpu


def _train(recipe: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "paralign.engine.cli", "train", str(recipe), "--nproc", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packed_bf16_run(tmp_path: Path) -> None:
    make_toy(tmp_path)
    settings: dict[str, Any] = {"model__dtype": "bf16", "model__deterministic": True, "train__max_steps": 20}
    shown = _train(write_recipe(tmp_path, "whole", {}, **settings, checkpoint__save_every_steps=10))
    assert "on cuda" in shown
    whole = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "whole") if "loss" in line}
    assert whole[19] < whole[0]

    (tmp_path / "whole/checkpoints/iter_0000020").rename(tmp_path / "later")
    _train(write_recipe(tmp_path, "whole", {}, **settings, checkpoint__save_every_steps=10))
    resumed = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "whole") if "loss" in line}
    assert resumed == whole

    offloaded = write_recipe(tmp_path, "offloaded", {}, **settings, optimizer__optimizer_cpu_offload=True)
    _train(offloaded)
    again = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "offloaded") if "loss" in line}
    assert again == pytest.approx(whole, rel=1e-3)
