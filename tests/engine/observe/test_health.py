"""Stalls: what is one, who is named; several ranks as threads of one process that share a directory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paralign.engine.observe import health as module
from paralign.engine.observe.health import EXIT_STALLED, Health, Position, describe_stall
from paralign.engine.processes.stop import Stop

STALL = 0.5


class Ended(SystemExit):
    """In place of the end of the process: it ends the thread."""


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []

    def leave(code: int) -> None:
        found.append(code)
        raise Ended

    monkeypatch.setattr(module.os, "_exit", leave)
    return found


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[[int], list[Health]]]:
    started: list[Health] = []

    def start(n: int, world_size: int | None = None) -> list[Health]:
        for rank in range(n):
            options = {"rank": rank, "world_size": world_size or n, "device": torch.device("cpu")}
            started.append(Health(tmp_path, **options, stop=Stop(), stall_seconds=STALL))  # type: ignore[arg-type]
            started[-1]._patience = 3 * STALL
            started[-1].__enter__()
            started[-1].at("forward and backward", 7)
        return started

    yield start
    for health in started:
        health.__exit__()


def move(health: Health, seconds: float) -> None:
    """As an evaluation, an export or a generation does: nothing but that it comes further."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        health.moved()
        time.sleep(0.05)


def test_a_step_of_the_wall_clock_is_no_stall(
    ranks: Callable[[int], list[Health]], codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    [health] = ranks(1)
    real = time.time
    for step in (3600.0, -3600.0):
        health.moved()
        monkeypatch.setattr(time, "time", lambda step=step: real() + step)
        time.sleep(STALL / 2)  # in which nobody moves, and the watch looks
    assert codes == []


def test_ranks_that_wait_for_one_that_moves_do_not_stall(
    ranks: Callable[[int], list[Health]],
    codes: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As most do while a few write an export; and when the few no longer move, one of them is named."""
    _, busy, _ = ranks(3)
    move(busy, 2.5 * STALL)
    assert codes == []
    busy.at("exporting final", 7)
    deadline = time.monotonic() + 10
    while len(codes) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert codes == [EXIT_STALLED] * 3
    assert capsys.readouterr().err.count("error: rank 1 on ") == 1
    stacks = [(tmp_path / f"stall/rank_{rank:05d}.txt").read_text() for rank in range(3)]
    assert all("Thread" in text for text in stacks)


def test_a_rank_that_does_not_answer_is_named(
    ranks: Callable[[int, int], list[Health]], codes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks(1, 2)
    deadline = time.monotonic() + 10
    while not codes and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "rank 1 stalled and does not answer; the others wait for it" in capsys.readouterr().err


def test_where_nothing_can_be_written_a_rank_says_where_it_is_itself(
    ranks: Callable[[int, int], list[Health]],
    codes: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ranks(1, 2)
    (tmp_path / "stall").write_text("")
    deadline = time.monotonic() + 10
    while not codes and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "stalled: step 7, forward and backward" in (error := capsys.readouterr().err)
    assert "stall: File exists" in error
    assert threading.active_count() < 10


def test_of_ranks_that_answer_the_one_behind_or_longest_still_is_slow() -> None:
    place = Position(0, "gpu1", "forward and backward", 7, 2, False, 100.0, "2026-01-01 00:00:00")
    written = {rank: replace(place, rank=rank, still=100.0 + (rank == 1)) for rank in range(4)}
    assert describe_stall(written, 4) == (
        "rank 1 on gpu1 stalled: step 7, micro-batch 2, forward and backward, for 101 s; the others wait for it"
    )
    written[1] = replace(written[1], waits=True)
    assert describe_stall(written, 4).startswith("rank 0 ")
    written[3] = replace(written[3], step=6, still=1.0)
    assert describe_stall(written, 4).startswith("rank 3 ")


def test_a_question_is_seen_where_nfs_still_says_that_the_name_is_absent(
    ranks: Callable[[int, int], list[Health]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [health] = ranks(1, 2)
    exists = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda path, **options: path.name != "stall" and exists(path, **options)
    )
    (tmp_path / "stall").mkdir()
    move(health, STALL)
    assert (tmp_path / "stall/rank_00000.txt").is_file()
