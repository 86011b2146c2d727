"""The scripts that measure on a GPU run to their end without one, and all trainers compute the same loss."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, output: Path, *options: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), "--output", str(output), *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    facts: dict = json.loads(output.read_text())
    assert "no figure here counts" in facts["note"]
    return facts | {"printed": ended.stdout}


def test_steps_of_every_trainer(tmp_path: Path) -> None:
    facts = run("gpu_step.py", tmp_path / "steps.json", "--steps", "1")
    assert set(facts["sft"]) == {
        "paralign",
        "paralign, kernels: reference",
        "megatron-core, local layers",
        "transformers",
        "TRL",
    }
    assert len(facts["dpo"]) == 4
    for group in ("sft", "dpo"):
        first = [result["first_loss"] for result in facts[group].values()]
        assert first == pytest.approx([first[0]] * len(first), rel=1e-5)
    assert list(facts["left_out"]) == ["TRL + Liger"]
    assert "TRL + Liger: left out, ImportError: liger_kernel is not installed" in facts["printed"]


def test_kernels_beside_their_peers(tmp_path: Path) -> None:
    facts = run("kernels.py", tmp_path / "kernels.json", "--tiny", "--repeats", "1")
    timed = [(result["operation"], result["direction"]) for result in facts["results"]]
    operations = {operation for operation, _ in timed}
    first = [
        (name, way) for name in ("RMSNorm", "RMSNorm of heads", "RoPE") for way in ("forward", "backward")
    ]
    assert list(dict.fromkeys(timed))[:6] == first
    assert operations == {
        *("RMSNorm", "RMSNorm of heads", "add + RMSNorm", "SwiGLU", "RoPE"),
        *("clip + AdamW", "head", "weight gradient"),
    }
    assert (tmp_path / "kernels.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "device_gb"), [("8b", 80), ("70b", 141)])
def test_a_geometry_fits_the_device_that_it_is_for(
    name: str, device_gb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sixth beside the dry run's peak: a reference model, CUDA, NCCL, what the allocator leaves unused."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    memory = importlib.import_module("memory")
    assert memory.predict(memory.GEOMETRIES[name], "bf16")["peak"] < device_gb * 1e9 * 5 / 6


@pytest.mark.slow
def test_saves_and_loads_beside_torchs(tmp_path: Path) -> None:
    small = {"nproc": 2, "tp": 1, "hidden": 128, "layers": 1, "vocabulary": 256, "repeats": 1}
    options = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    facts = run("checkpoint.py", tmp_path / "checkpoint.json", *options)
    ways = [f"{layout}, {how}" for layout in ("any", "same") for how in ("sync", "load", "async")]
    gathered = [f"any, megatron-core's gather, {how}" for how in ("async", "load")]
    assert set(facts["results"]) == {*ways, *gathered, "dcp.save", "dcp.async_save", "dcp.load"}
    for figures in facts["results"].values():
        assert 0 < figures["blocked"] <= figures["all"]
