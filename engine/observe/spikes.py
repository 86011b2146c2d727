"""Losses and gradient norms that stand out from the steps before them, and the section that says what is one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Literal

from pydantic import Field

from ..config.decoding import Section

WATCHED = ("loss", "grad_norm")
_TO_SIGMA = 1.4826  # of a normal distribution: its standard deviation over its median absolute deviation
_LEAST_SPREAD = 0.01  # of the median: a window of almost equal values must not make a spike of a small change


class SpikeConfig(Section):
    """What counts as a spike of the loss or of the gradient norm, and what is done about it.

    Attributes:
        window: accepted steps that a step is held against; before there are so many, nothing is judged. A resumed
            run goes on with the window of its checkpoint.
        threshold: how far above the window's median is a spike, in robust standard deviations (1.4826 times the
            median absolute deviation, and at least 1% of the median).
        action: `warn` says it in the log and goes on, `skip` leaves the step out, `stop` saves the state before it
            and ends the run; each names the step's samples.
    """

    window: int = Field(default=128, ge=8)
    threshold: float = Field(default=30.0, gt=0)
    action: Literal["warn", "skip", "stop"] = "warn"


class Spikes:
    """Judges steps by those before them; equal on ranks that are told equal values.

    Args:
        seen: values of WATCHED of earlier steps, oldest first, as `window` gave them.
    """

    def __init__(self, config: SpikeConfig, seen: Iterable[Iterable[float]] = ()) -> None:
        self._config = config
        self._seen: deque[tuple[float, ...]] = deque(map(tuple, seen), maxlen=config.window)

    @property
    def window(self) -> tuple[tuple[float, ...], ...]:
        """What a resumed run needs to judge as this one would have."""
        return tuple(self._seen)

    def judge(self, values: Mapping[str, float]) -> str | None:
        """What of a step is a spike, in words; None if nothing is. Only values above the median are."""
        if len(self._seen) < self._config.window:
            return None
        found = [self._above(name, values[name], i) for i, name in enumerate(WATCHED)]
        return " and ".join(text for text in found if text) or None

    def accept(self, values: Mapping[str, float]) -> None:
        """Take a step into the window."""
        taken = tuple(float(values[name]) for name in WATCHED)
        if all(map(math.isfinite, taken)):
            self._seen.append(taken)

    def _above(self, name: str, value: float, column: int) -> str | None:
        column_N = [seen[column] for seen in self._seen]
        middle = median(column_N)
        spread = max(
            _TO_SIGMA * median(abs(other - middle) for other in column_N), _LEAST_SPREAD * abs(middle)
        )
        if not value - middle > self._config.threshold * spread:
            return None
        times = f"{(value - middle) / spread:,.0f}" if spread else "more than any number of"
        return (
            f"the {name} {value:.6g} lies {times} standard deviations above {middle:.6g}, "
            f"the median of {len(column_N)} steps"
        )
