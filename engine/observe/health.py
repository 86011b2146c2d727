"""Whether a run should go on: all ranks agree on a request to stop, and ranks that no longer move are noticed.

Watches, and names a slow rank. What is done about a stop is the trainer's.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..processes.stop import Stop

EXIT_STALLED = 76
_LINE = 400  # bytes of a position on disk: it is written over in place
_NAMED = "named"  # whoever makes this file prints

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Position:
    """Where a rank is.

    Attributes:
        micro_batch: None outside the schedule.
        waits: it was found to wait, while other ranks moved, for longer than a stall.
        still: seconds without a move, its own or, where it waits, another's. Ages, not times, are compared: clocks
            of nodes differ, and are set.
        clock: when this was said, by that node's clock, for people.
    """

    rank: int
    host: str
    operation: str
    step: int
    micro_batch: int | None
    waits: bool
    still: float
    clock: str


@dataclass(frozen=True)
class _Place:
    """What a rank does, since when by `time.monotonic`."""

    operation: str
    step: int
    micro_batch: int | None
    since: float


class Health:
    """Watches one rank while it trains; a context manager.

    A run stalls when no rank has moved for `stall_seconds`: one that only waits, as for the ranks that write an
    export, is not slow. A rank without a move asks where the others are by making `stall/` in `run_dir`. Each answers
    there, in `rank_00003.txt`: its position, written over while it is there, and the stack of every thread of ranks
    without a move. When all are without one, or do not answer, one rank says who is slow and all of them leave.

    Args:
        stop: whether this rank was asked to stop.
        stall_seconds: without a move for so long, the rank asks, and may end the run with `EXIT_STALLED`. It must be
            longer than any single operation, and shorter than the collectives' own time-out.
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
        self._rank, self._world_size = rank, world_size
        self._device = device
        self._stall_seconds = stall_seconds
        self._interval = min(1.0, stall_seconds / 5)
        self._patience = min(30.0, max(2.0, stall_seconds / 3))  # for an answer
        self._place = _Place("start", 0, None, time.monotonic())
        self._others_moved = 0.0
        self._stop = stop
        self._done = threading.Event()

    def __enter__(self) -> Health:
        if self._rank == 0:
            shutil.rmtree(self._directory, ignore_errors=True)
        self.moved()
        threading.Thread(target=self._watch, name="stall watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def at(self, operation: str, step: int) -> None:
        """Say what begins now."""
        self._place = _Place(operation, step, None, time.monotonic())

    def moved(self) -> None:
        """Say that what goes on has come further."""
        self._place = replace(self._place, since=time.monotonic())

    def marking(self, packs: Sequence[ItemT]) -> Sequence[ItemT]:
        """The same packs; whoever iterates over them moves this rank's position along."""
        return _Marking(packs, self)

    def reached(self, micro_batch: int) -> None:
        """Say which micro-batch begins now."""
        self._place = replace(self._place, micro_batch=micro_batch, since=time.monotonic())

    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them. Collective."""
        asked = torch.tensor([float(self._stop.signal)], device=self._device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        agreed = int(asked.item())
        self._stop.signal = max(self._stop.signal, agreed)
        return agreed > 0

    def _watch(self) -> None:
        answers: _Answers | None = None  # of all ranks, while this one asks
        while not self._done.wait(self._interval):
            try:
                if self._still() <= self._stall_seconds:
                    if answers is not None:  # what this rank asked is settled
                        shutil.rmtree(self._directory, ignore_errors=True)
                        answers = None
                    elif self._directory.name in _names(self._directory.parent):
                        self._answer()
                    continue
                if answers is None:
                    self._directory.mkdir(parents=True, exist_ok=True)
                    self._answer(stacks=True)
                    answers = _Answers(self._directory, self._world_size, self._patience)
                else:
                    self._answer()
                youngest = answers.youngest(self._stall_seconds)
                if youngest > self._stall_seconds:
                    self._leave(answers.positions())
                # Ranks that wait for this one have moved little later than it: so young is none of them.
                if youngest < self._stall_seconds / 2:
                    self._others_moved = time.monotonic() - youngest
            except FileNotFoundError:  # somebody's question is settled, and the directory gone just now
                answers = None
            except OSError as refused:  # as on a full disk: the others cannot be asked
                if self._still() > self._stall_seconds:
                    self._leave({self._rank: self._position()}, f"; {self._directory}: {refused.strerror}")

    def _still(self) -> float:
        """Seconds without a move, or, of a rank that waits, since it found that another one moves."""
        return time.monotonic() - max(self._place.since, self._others_moved)

    def _position(self) -> Position:
        place = self._place
        return Position(
            rank=self._rank,
            host=socket.gethostname()[:64],
            operation=place.operation[:100],
            step=place.step,
            micro_batch=place.micro_batch,
            waits=self._others_moved > place.since,
            still=round(self._still(), 2),
            clock=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def _answer(self, *, stacks: bool = False) -> None:
        """Write where this rank is; in place and closed again, which NFS shows to the next who opens the file."""
        path = _file(self._directory, self._rank)
        if not stacks and path.exists():
            with path.open("r+b") as known:
                known.write(_line(self._position()))
            return
        with path.open("wb") as file:
            file.write(_line(self._position()))
            file.flush()
            if stacks:
                faulthandler.dump_traceback(file=file, all_threads=True)

    def _leave(self, positions: Mapping[int, Position], trouble: str = "") -> None:
        """End this process; the first that comes here says who is slow. Never returns."""
        try:
            os.close(os.open(self._directory / _NAMED, os.O_CREAT | os.O_EXCL))
            is_first = True
        except FileExistsError:
            is_first = False
        except OSError:
            is_first = True  # nothing can be written: every rank says where itself is
        if is_first:
            text = describe_stall(positions, 1 if trouble else self._world_size)
            print(f"error: {text}; see {self._directory}{trouble}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # whoever leaves first ends the others, and that one has to print
        os._exit(EXIT_STALLED)


class _Answers:
    """What the ranks write, read again and again.

    Ages go on from the moment at which an answer was first met here, by this node's clock, so that those of ranks
    which wrote earlier or later can be compared.
    """

    def __init__(self, directory: Path, world_size: int, patience: float) -> None:
        self._directory, self._world_size, self._patience = directory, world_size, patience
        self._asked = time.monotonic()
        self._met: dict[int, tuple[Position, float]] = {}

    def youngest(self, stall_seconds: float) -> float:
        """Seconds since some rank moved last; `stall_seconds` while one that moves may still answer."""
        now = time.monotonic()
        there = _names(self._directory)
        for rank in range(self._world_size):
            path = _file(self._directory, rank)
            position = _read(path) if path.name in there else None
            if position and (rank not in self._met or self._met[rank][0] != position):
                self._met[rank] = position, now
        found = min((position.still + now - met for position, met in self._met.values()), default=math.inf)
        may_answer = len(self._met) < self._world_size and now - self._asked < self._patience
        return min(found, stall_seconds) if may_answer else found

    def positions(self) -> dict[int, Position]:
        """The answers, as old as they are now; without those of ranks that have stopped to answer."""
        now = time.monotonic()
        return {
            rank: replace(position, still=position.still + now - met)
            for rank, (position, met) in self._met.items()
            if now - met < self._patience
        }


def describe_stall(positions: Mapping[int, Position], world_size: int) -> str:
    """Names the slow rank: one that could not even write; or else of those at the earliest step, which did not wait,
    the one that has not moved for longest. The others went on until they needed it.
    """
    silent = [rank for rank in range(world_size) if rank not in positions]
    if silent and world_size > 1:
        return f"rank {', '.join(map(str, silent))} stalled and does not answer; the others wait for it"
    slow = min(positions.values(), key=lambda position: (position.step, position.waits, -position.still))
    place = f"step {slow.step}" + ("" if slow.micro_batch is None else f", micro-batch {slow.micro_batch}")
    return (
        f"rank {slow.rank} on {slow.host} stalled: {place}, {slow.operation}, for {slow.still:.0f} s; "
        "the others wait for it"
    )


def _names(directory: Path) -> set[str]:
    """What a directory holds now: NFS asks the server when one is opened; that a name is absent it keeps for up to a
    minute, which is longer than anybody waits for an answer."""
    return set(os.listdir(directory))


def _file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:05d}.txt"


def _line(position: Position) -> bytes:
    return json.dumps(asdict(position)).encode()[: _LINE - 1].ljust(_LINE - 1) + b"\n"


def _read(path: Path) -> Position | None:
    try:
        return Position(**json.loads(path.read_bytes()[:_LINE]))
    except (OSError, ValueError, TypeError):  # not there, or just being written
        return None


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
