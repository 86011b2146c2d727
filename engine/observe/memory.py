"""Measures the peak memory of every rank and writes memory.json."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ..files.refused import refusals_told
from ..files.whole_file import write_whole

WORTH_WRITING = 1.01  # how much some peak must grow before the file is written again


class Memory:
    """Gathers peaks: what torch allocated on the GPU at once, or on the CPU the process's resident size.

    The file `run_dir/memory.json` holds {"rank", "tp", …, "peak_gb"} for each rank, in 10⁹ bytes, and on GPUs
    "peak_reserved_gb": what torch's allocator held at once, gaps included. It is kept up to date from the first
    report on, so that a run which dies of memory later leaves it behind.

    Args:
        place: this rank's number along each axis, by the axis' name.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, world_size: int, place: Mapping[str, int], device: torch.device
    ) -> None:
        self._path = run_dir / "memory.json"
        self._rank, self._world_size, self._place, self._device = rank, world_size, place, device
        self._written = [0.0] * world_size

    def start(self) -> None:
        """Forget what a start before this one left, perhaps at another layout."""
        if self._rank == 0:
            with refusals_told(self._path):
                self._path.unlink(missing_ok=True)

    def read(self) -> dict[str, float]:
        """`peak_memory_gb` of the fullest rank so far, and `peak_reserved_memory_gb` on GPUs. Collective."""
        peaks = _peak_bytes(self._device)
        mine = torch.tensor(
            [self._rank, *self._place.values(), *peaks.values()], dtype=torch.float64, device=self._device
        )
        every = [torch.empty_like(mine) for _ in range(self._world_size)]
        dist.all_gather(every, mine)
        rows = [dict(zip(("rank", *self._place, *peaks), row)) for row in torch.stack(every).tolist()]
        grown = any(row["peak"] > WORTH_WRITING * before for row, before in zip(rows, self._written))
        if self._rank == 0 and grown:
            self._written = [row["peak"] for row in rows]
            ranks = [
                {name: int(row[name]) for name in ("rank", *self._place)}
                | {f"{name}_gb": round(row[name] / 1e9, 3) for name in peaks}
                for row in rows
            ]
            with refusals_told(self._path):
                write_whole(self._path, json.dumps(ranks, indent=1) + "\n")
        return {f"{name}_memory_gb": max(row[name] for row in rows) / 1e9 for name in peaks}


def _peak_bytes(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        return {
            "peak": torch.cuda.max_memory_allocated(device),
            "peak_reserved": torch.cuda.max_memory_reserved(device),
        }
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
