"""Steps in turn: the loader's part is made ahead on a thread; order, errors, ends, and children forked meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from paralign.engine.batch import StepBatch
from paralign.engine.columns.steps import Steps
from paralign.engine.processes.child import Child


class Loader:
    """A step is its number, if the loader does not fail at it."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.asked_for: list[int] = []
        self.thread = ""

    def begin_thread(self) -> None:
        self.thread = threading.current_thread().name

    def step(self, number: int) -> StepBatch:
        assert threading.current_thread().name == self.thread
        self.asked_for.append(number)
        if number == self.fails_at:
            raise OSError(f"step {number} cannot be read")
        return StepBatch([], {}, n_samples=number, n_tokens=0, sample_ids=())


class Filler:
    def __init__(self) -> None:
        self.filled: list[int] = []

    def fill(self, batch: StepBatch) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.filled.append(batch.n_samples)


def in_turn(loader: Any, numbers: range, *fillers: Any) -> Any:
    return closing(Steps(loader, fillers).in_turn(numbers))


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.001)
    return holds()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("next step")]


def test_one_step_is_made_ahead_none_twice_and_models_fill_their_columns_here() -> None:
    loader, filler = Loader(), Filler()
    with in_turn(loader, range(3, 7), filler) as batches:
        for number in range(3, 7):
            assert next(batches).n_samples == number
            assert filler.filled == list(range(3, number + 1))
            ahead = min(number + 1, 6)
            assert soon(lambda ahead=ahead: loader.asked_for[-1] == ahead)
        assert next(batches, None) is None
    assert loader.asked_for == [3, 4, 5, 6]
    assert threads() == []


def test_an_error_comes_with_its_step_and_the_thread_ends() -> None:
    with in_turn(Loader(fails_at=2), range(5)) as batches:
        assert [next(batches).n_samples, next(batches).n_samples] == [0, 1]
        with pytest.raises(OSError, match="step 2 cannot be read"):
            next(batches)
        assert threads() == []


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_run_that_ends_early_leaves_no_thread(taken: int) -> None:
    """Not an error either, of a step that was never asked for."""
    with in_turn(Loader(fails_at=2), range(5)) as batches:
        for _ in range(taken):
            next(batches)
    assert threads() == []


def test_a_child_that_is_forked_while_the_thread_reads_gives_its_answer(tmp_path: Path) -> None:
    """As a save in the background: it takes no lock that the thread may hold."""
    file = tmp_path / "numbers"
    file.write_bytes(bytes(2**20))

    class Reading(Loader):
        def step(self, number: int) -> StepBatch:
            for _ in range(50):
                file.read_bytes()
            return super().step(number)

    with in_turn(Reading(), range(21)) as batches:
        for _ in range(20):
            next(batches)
            child = Child(lambda: (tmp_path / "written").write_bytes(bytes(100)))
            assert soon(lambda child=child: not child.running())
            assert child.result() == 100
