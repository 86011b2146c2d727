"""Whether a run should go on: all ranks agree on a request to stop, and ranks that no longer move are noticed.

Watches, and names a slow rank. What is done about a stop is the trainer's.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..processes.stop import Stop

EXIT_STALLED = 76

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Position:
    """Where a rank is: `micro_batch` is None outside the schedule, `since` is in seconds since 1970."""

    rank: int
    operation: str
    step: int
    micro_batch: int | None
    since: float


class Health:
    """Watches one rank while it trains; a context manager.

    Args:
        stop: whether this rank was asked to stop.
        run_dir: stalls are written to `stall/rank_00003.txt` there: the position, then the stack of every thread.
        stall_seconds: without a move for so long, the rank ends the run with `EXIT_STALLED`. It must be longer
            than any single operation, such as an export, and shorter than the collectives' own time-out.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        stop: Stop,
        stall_seconds: float,
    ) -> None:
        self._directory = run_dir / "stall"
        self._world_size = world_size
        self._device = device
        self._stall_seconds = stall_seconds
        self._position = Position(rank, "start", 0, None, time.time())
        self._stop = stop
        self._done = threading.Event()

    def __enter__(self) -> Health:
        if self._position.rank == 0:
            shutil.rmtree(self._directory, ignore_errors=True)
        threading.Thread(target=self._watch, name="stall watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def at(self, operation: str, step: int) -> None:
        """Say what begins now."""
        self._position = Position(self._position.rank, operation, step, None, time.time())

    def marking(self, packs: Sequence[ItemT]) -> Sequence[ItemT]:
        """The same packs; whoever iterates over them moves this rank's position along."""
        return _Marking(packs, self)

    def reached(self, micro_batch: int) -> None:
        """Say which micro-batch begins now."""
        self._position = replace(self._position, micro_batch=micro_batch, since=time.time())

    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them. Collective."""
        asked = torch.tensor([float(self._stop.signal)], device=self._device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        agreed = int(asked.item())
        self._stop.signal = max(self._stop.signal, agreed)
        return agreed > 0

    def _watch(self) -> None:
        interval = min(1.0, self._stall_seconds / 5)
        while not self._done.wait(interval):
            if time.time() - self._position.since > self._stall_seconds:
                self._report_stall()

    def _report_stall(self) -> None:
        """Write where this rank is; the lowest rank that still can names the slow one. Never returns."""
        position = self._position
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._file(position.rank).open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(position)) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        # The others run into the same time-out, each a little later: they moved on until they needed this one.
        deadline = time.time() + min(30.0, max(2.0, self._stall_seconds / 3))
        while time.time() < deadline and len(self._written()) < self._world_size:
            time.sleep(0.1)
        written = self._written()
        if position.rank == min(written):
            print(
                f"error: {describe_stall(written, self._world_size)}; see {self._directory}", file=sys.stderr
            )
            sys.stderr.flush()
        else:
            time.sleep(1)  # whoever leaves first ends the others, and that one has to print
        os._exit(EXIT_STALLED)

    def _written(self) -> dict[int, Position]:
        found = {}
        for rank in range(self._world_size):
            try:
                found[rank] = Position(
                    **json.loads(self._file(rank).read_text(encoding="utf-8").split("\n")[0])
                )
            except (OSError, ValueError):
                continue
        return found

    def _file(self, rank: int) -> Path:
        return self._directory / f"rank_{rank:05d}.txt"


def describe_stall(written: dict[int, Position], world_size: int) -> str:
    """Names the slow rank: one that could not even write, or else the one that moved last the longest ago.

    The others went on until they needed it, so their last move is younger.
    """
    silent = [rank for rank in range(world_size) if rank not in written]
    if silent:
        return f"rank {', '.join(map(str, silent))} stalled and does not answer; the others wait for it"
    slow = min(written.values(), key=lambda position: position.since)
    place = f"step {slow.step}" + ("" if slow.micro_batch is None else f", micro-batch {slow.micro_batch}")
    clock = time.strftime("%H:%M:%S", time.localtime(slow.since))
    return f"rank {slow.rank} stalled: {place}, {slow.operation}, since {clock}; the others wait for it"


class _Marking(Sequence[ItemT]):
    def __init__(self, items: Sequence[ItemT], health: Health) -> None:
        self._items, self._health = items, health

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[ItemT]:
        for i, item in enumerate(self._items):
            self._health.reached(i)
            yield item
