"""Whether two runs are the same to the bit: what they logged, and what they exported."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from paralign.engine.observe.metrics import read_metrics

OF_THE_MACHINE = {
    *("step", "time", "tokens_per_second", "tflops_per_gpu", "peak_memory_gb", "peak_reserved_memory_gb"),
    *("slow_rank", "slow_rank_ratio"),
}


def metrics_of(run_dir: Path) -> dict[tuple[int, str], float]:
    """By step and name, less what depends on the machine: speeds, and that a rank is slow."""
    return {
        (line["step"], name): value
        for line in read_metrics(run_dir)
        for name, value in line.items()
        if name not in OF_THE_MACHINE and not (name == "note" and " is slow: " in value)
    }


def assert_weights_equal(ours: Path, theirs: Path) -> None:
    """Two Hugging Face directories hold the same tensors, in however many files."""
    our_tensors, their_tensors = _weights(ours), _weights(theirs)
    assert our_tensors.keys() == their_tensors.keys() != set()
    assert [name for name, ours in our_tensors.items() if not torch.equal(ours, their_tensors[name])] == []


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
