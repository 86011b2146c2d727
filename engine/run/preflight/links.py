"""How fast ranks talk along each axis of a layout, and whether what arrives is right."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ...parallel.mesh import Axis, Mesh

_BYTES = {"cuda": 2**28, "cpu": 2**22}
_TIMES = 5


@dataclass(frozen=True)
class Link:
    """One group of ranks along an axis, as one of them sees it.

    Attributes:
        ranks: of the group, in the world.
        gb_per_second: 10⁹ bytes a second that a rank sends and receives, in the fastest of several rounds: for
            sums by NCCL's measure (bus bandwidth, 2(n−1)/n of the bytes), for pipelines a tensor to the next stage.
        right: whether the sums, or what came from the stage before, were right.
    """

    ranks: tuple[int, ...]
    gb_per_second: float
    right: bool


def measure(mesh: Mesh) -> dict[str, Link]:
    """This rank's group along each axis that has several ranks. Collective."""
    found = {}
    for name, axis in mesh.axes.items():
        mesh.barrier()  # axes one after the other: the next must not share their wires
        if axis.size > 1:
            ranks = tuple(dist.get_process_group_ranks(axis.group))
            found[name] = Link(ranks, *(_to_next if name == "pp" else _sum)(axis, mesh.device))
    mesh.barrier()
    return found


def _sum(axis: Axis, device: torch.device) -> tuple[float, bool]:
    def run() -> None:
        dist.all_reduce(values, group=axis.group)

    expected = axis.size * (axis.size + 1) / 2
    values, seconds, right = torch.empty(0), [], True
    for _ in range(_TIMES):
        values = _full(axis.rank + 1, device)
        seconds.append(_timed(run, axis.group, device))
        right = right and bool((values == expected).all())
    return 2 * (axis.size - 1) / axis.size * values.nbytes / min(seconds) / 1e9, right


def _to_next(axis: Axis, device: torch.device) -> tuple[float, bool]:
    def run() -> None:
        requests = [
            dist.P2POp(dist.isend, mine, group=axis.group, group_peer=after),
            dist.P2POp(dist.irecv, theirs, group=axis.group, group_peer=before),
        ]
        for request in dist.batch_isend_irecv(requests):
            request.wait()

    before, after = (axis.rank - 1) % axis.size, (axis.rank + 1) % axis.size
    mine, seconds, right = _full(axis.rank + 1, device), [], True
    theirs = torch.empty_like(mine)
    for _ in range(_TIMES):
        theirs.zero_()
        seconds.append(_timed(run, axis.group, device))
        right = right and bool((theirs == before + 1).all())
    return mine.nbytes / min(seconds) / 1e9, right


def _full(value: float, device: torch.device) -> torch.Tensor:
    return torch.full((_BYTES[device.type] // 4,), float(value), device=device)


def _timed(run: Any, group: Any, device: torch.device) -> float:
    dist.barrier(group=group)
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
