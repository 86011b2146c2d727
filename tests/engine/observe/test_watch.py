"""Whatever watches a run is closed, and the first error is the one that is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from paralign.engine.observe.metrics import MetricsLog
from paralign.engine.observe.throughput import Throughput
from paralign.engine.observe.watch import Watch


class _Sink:
    """Notes what it is told."""

    place = Path("a sink")

    def __init__(self) -> None:
        self.told: list[str] = []

    def start(self, facts: Mapping[str, str]) -> None:
        self.told.append(f"start {dict(facts)}")

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def note(self, step: int, text: str) -> None: ...

    def close(self) -> None:
        self.told.append("close")


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def sink() -> _Sink:
    return _Sink()


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def _watch(sink: _Sink, clock: _Clock | None = None, **parts: Any) -> Watch:
    health = MagicMock(**{"__exit__.return_value": None})
    throughput = Throughput(world_size=1, peak=None, clock=clock or _Clock())
    parts = {
        "health": health,
        "memory": MagicMock(),
        "profiler": MagicMock(),
        "own_work": MagicMock(),
    } | parts
    return Watch(MetricsLog(sink), throughput=throughput, facts={"model": "tiny"}, **parts)


FULL = MagicMock(**{"stop.side_effect": OSError(28, "No space left on device")})


def test_the_log_starts_with_the_steps_and_ends_with_them(sink: _Sink) -> None:
    watch = _watch(sink)
    assert sink.told == []
    with watch:
        assert sink.told == ["start {'model': 'tiny'}"]
    assert sink.told[1:] == ["close"]


def test_a_trace_that_cannot_be_written_leaves_nothing_open(sink: _Sink) -> None:
    with pytest.raises(OSError, match="No space left"), _watch(sink, profiler=FULL):
        pass
    assert sink.told[-1] == "close"


def test_the_first_error_is_told_and_the_later_one_beside_it(sink: _Sink) -> None:
    with pytest.raises(ValueError, match="the first") as raised, _watch(sink, profiler=FULL):
        raise ValueError("the first")
    assert sink.told[-1] == "close"
    assert "No space left on device" in raised.value.__notes__[0]


def test_what_fails_at_the_start_leaves_nothing_open(sink: _Sink) -> None:
    memory = MagicMock(**{"start.side_effect": RuntimeError("no device")})
    with pytest.raises(RuntimeError, match="no device"), _watch(sink, memory=memory):
        pass
    assert sink.told[-1] == "close"


def test_time_aside_is_none_of_a_steps_after_an_error_either(sink: _Sink, clock: _Clock) -> None:
    watch = _watch(sink, clock, profiler=MagicMock(**{"is_last.return_value": False}))
    watch.step_done(0, n_tokens=10, flops=1.0)

    def fail() -> None:
        with watch.aside("evaluation", 1):
            clock.now += 100
            raise RuntimeError("in the midst")

    with pytest.raises(RuntimeError, match="in the midst"):
        fail()
    clock.now += 1
    watch.step_done(1, n_tokens=100, flops=1.0)
    assert watch._throughput.read()["tokens_per_second"] == pytest.approx(100)
