"""Which rank holds the others up: the time of each rank's own work, without what it waits for others.

Ranks of a step wait for the slowest in every collective, so the time of a step is the same on all of them. What is
measured here holds no collective: in the forward pass of each layer, from its start to the end of attention, and in
the MLP up to its second matrix. With sequence parallelism both begin with a gather, and it is attention alone and
what lies between the two matrices of the MLP. Megatron's StragglerDetector times whole forward passes, collectives
included, and so tells copies of the model apart, but no ranks of one tensor-parallel group; NVIDIA's resiliency
extension does by kernels, through CUPTI.

It does not see: what is slow outside the layers (data, embedding, head, optimizer, disks), a slow link (preflight
does), or a rank that is slow in backward passes only.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

SLOW = 1.5  # times the median of ranks
IN_A_ROW = 3  # reports in which a rank must be the slowest: others' processes disturb any rank once
MATTERS = 0.05  # share of the time since the last report that the slow rank must cost
ENOUGH = 10_000  # timed pieces between two reports


class OwnWork:
    """Times this rank's own work, and compares it with that of the others.

    Args:
        layers: of this rank, as modules of Megatron's names.
        gathers: whether attention and MLP begin with a gather, by sequence parallelism.
    """

    def __init__(
        self, layers: Sequence[Any], *, gathers: bool, rank: int, world_size: int, device: torch.device
    ) -> None:
        self._rank, self._world_size, self._device = rank, world_size, device
        self._marks: list[tuple[Any, Any]] = []
        self._mark: Callable[[], Any] = _event if device.type == "cuda" else time.perf_counter
        self._begun: Any = None
        self._passes, self._counts = 0, True
        self._since = time.monotonic()
        self._slowest: list[int] = []
        for layer in layers:
            attention, mlp = layer.self_attention.core_attention, layer.mlp
            (attention if gathers else layer).register_forward_pre_hook(self._begin_layer)
            attention.register_forward_hook(self._end)
            if gathers:
                mlp.linear_fc1.register_forward_hook(self._begin)
            else:
                mlp.register_forward_pre_hook(self._begin)
            mlp.linear_fc2.register_forward_pre_hook(self._end)

    def _begin_layer(self, *unused: Any) -> None:
        self._counts = len(self._marks) < ENOUGH
        self._passes += self._counts
        self._begin()

    def _begin(self, *unused: Any) -> None:
        self._begun = self._mark() if self._counts else None

    def _end(self, *unused: Any) -> None:
        if self._begun is not None:
            self._marks.append((self._begun, self._mark()))
            self._begun = None

    def restart(self) -> None:
        """Forget what was measured: something else than training ran."""
        self._marks, self._passes, self._since = [], 0, time.monotonic()

    def read(self) -> tuple[dict[str, float], str | None]:
        """Compare the ranks' time in a layer since the last reading. Collective.

        Returns:
            `slow_rank` and `slow_rank_ratio`, its time over the median, where one rank was over 1.5 times the median
            in three readings in a row; else nothing. And the same in words, at the first of those readings.
        """
        elapsed = time.monotonic() - self._since
        mine = torch.tensor(
            [self._seconds() / max(1, self._passes), self._passes, elapsed],
            dtype=torch.float64,
            device=self._device,
        )
        self.restart()
        every = [torch.empty_like(mine) for _ in range(self._world_size)]
        dist.all_gather(every, mine)
        rows = torch.stack(every).tolist()
        slowest, ratio, lost = _slowest([(seconds, int(passes)) for seconds, passes, _ in rows])
        if ratio <= SLOW or lost <= MATTERS * rows[0][2]:  # one clock's time, so that all ranks agree
            self._slowest = []
            return {}, None
        self._slowest = [*self._slowest, slowest] if self._slowest[-1:] in ([], [slowest]) else [slowest]
        if len(self._slowest) < IN_A_ROW:
            return {}, None
        words = None
        if len(self._slowest) == IN_A_ROW:
            hosts: list[Any] = [None] * self._world_size
            dist.all_gather_object(hosts, socket.gethostname())
            words = (
                f"rank {slowest} on {hosts[slowest]} is slow: its own work in a layer takes {ratio:.1f} times the "
                "median of ranks, and all wait for it; look at that node, and let paralign preflight compare it"
            )
        return {"slow_rank": float(slowest), "slow_rank_ratio": ratio}, words

    def _seconds(self) -> float:
        if self._device.type != "cuda":
            return sum(end - begin for begin, end in self._marks)
        torch.cuda.synchronize(self._device)
        return sum(begin.elapsed_time(end) for begin, end in self._marks) / 1e3


def _slowest(ranks: Sequence[tuple[float, int]]) -> tuple[int, float, float]:
    """The slowest of (seconds in a layer, layers computed), its ratio to the median, and the seconds it cost.

    Of an even number the lower median, so that of two ranks one can be slow.
    """
    times = [time for time, _ in ranks]
    median = statistics.median_low(times)
    rank = max(range(len(times)), key=times.__getitem__)
    if len(times) < 2 or median <= 0:
        return rank, 1.0, 0.0
    return rank, times[rank] / median, (times[rank] - median) * ranks[rank][1]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
