"""Peaks of memory: what is written and logged of GPUs and of the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paralign.engine.observe import memory as module
from paralign.engine.observe.memory import Memory


def _every_rank_as_this_one(every: list[torch.Tensor], mine: torch.Tensor) -> None:
    for rank, row in enumerate(every):
        row.copy_(mine)
        row[0] = rank
    every[-1][2:] *= 2


def test_gpus_tell_what_is_allocated_and_what_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.dist, "all_gather", _every_rank_as_this_one)
    gpu: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.append(device) or 30e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: gpu.append(device) or 36e9)
    cpu = torch.device("cpu")
    memory = Memory(tmp_path, rank=0, world_size=2, place={"tp": 0}, device=cpu)
    monkeypatch.setattr(module, "_peak_bytes", lambda device, theirs=module._peak_bytes: theirs(cuda))
    cuda = torch.device("cuda", 0)
    assert memory.read() == {"peak_memory_gb": 60.0, "peak_reserved_memory_gb": 72.0}
    assert set(gpu) == {cuda}
    assert json.loads((tmp_path / "memory.json").read_text()) == [
        {"rank": 0, "tp": 0, "peak_gb": 30.0, "peak_reserved_gb": 36.0},
        {"rank": 1, "tp": 0, "peak_gb": 60.0, "peak_reserved_gb": 72.0},
    ]


def test_the_cpu_holds_nothing_in_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.dist, "all_gather", _every_rank_as_this_one)
    memory = Memory(tmp_path, rank=0, world_size=1, place={}, device=torch.device("cpu"))
    assert list(memory.read()) == ["peak_memory_gb"]
    assert [list(row) for row in json.loads((tmp_path / "memory.json").read_text())] == [["rank", "peak_gb"]]
