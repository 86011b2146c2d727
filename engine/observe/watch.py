"""Everything that watches a run, as one: log, stalls, throughput, memory, traces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TypeVar

from .health import Health
from .memory import Memory
from .metrics import MetricsLog
from .own_work import OwnWork
from .profiler import Profiler
from .throughput import Throughput

ItemT = TypeVar("ItemT")


class Watch:
    """Is told what a run does next, and writes what it measures. A context manager around the run's steps.

    Attributes:
        log: where words and numbers go.

    Args:
        facts: what the log shows first.
    """

    def __init__(
        self,
        log: MetricsLog,
        health: Health,
        throughput: Throughput,
        memory: Memory,
        profiler: Profiler,
        own_work: OwnWork,
        facts: Mapping[str, str],
    ) -> None:
        self.log, self._facts = log, facts
        self._health, self._throughput = health, throughput
        self._memory, self._profiler, self._own_work = memory, profiler, own_work

    def __enter__(self) -> Watch:
        with ExitStack() as entered:  # what fails here closes what is open
            entered.callback(self.log.close)
            entered.callback(self._profiler.stop)
            self.log.start(self._facts)
            self._memory.start()
            entered.enter_context(self._health)
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._entered.__exit__(kind, error, trace)
        except Exception as later:
            if error is None or later is error:
                raise
            error.add_note(f"and at the end of the run: {later!r}")

    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them. Collective."""
        return self._health.stop_agreed()

    def at(self, operation: str, step: int) -> None:
        """Say what begins now, as a part of training step `step`."""
        self._health.at(operation, step)

    @contextmanager
    def aside(self, operation: str, step: int) -> Iterator[None]:
        """Say that something else than training begins now: it does not count as time of a step."""
        go_on = self._throughput.pause()
        self._health.at(operation, step)
        try:
            yield
        finally:
            go_on()
            self._own_work.restart()

    def moved(self) -> None:
        """Say that what goes on has come further: whatever takes long and is healthy says so now and then."""
        self._health.moved()

    def marking(self, packs: Sequence[ItemT]) -> Sequence[ItemT]:
        """The same packs; whoever iterates over them says by that which one begins."""
        return self._health.marking(packs)

    def step_begins(self, step: int) -> None:
        """Training step `step` begins, with its data."""
        self._health.at("data", step)
        self._profiler.step_begins(step)

    def step_done(self, step: int, *, n_tokens: int, flops: float) -> None:
        """Training step `step` is done: its real tokens and model FLOPs over all GPUs."""
        self._throughput.step_done(n_tokens, flops)
        if self._profiler.is_last(step):
            with self.aside("writing a trace", step):
                self._profiler.stop()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Log a training step's values with throughput and memory, and name a slow rank. Collective."""
        slow, words = self._own_work.read()
        if words:
            self.log.note(step, words)
        self.log.log(step, {**values, **self._throughput.read(), **self._memory.read(), **slow})
