"""Whether a step is taken into the weights, by its loss and its gradient norm."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Literal, NamedTuple

from ..observe.spikes import SpikeConfig, Spikes
from ..parallel.mesh import Mesh

Action = Literal["warn", "skip", "stop"]


class Verdict(NamedTuple):
    """What is wrong with a step, nothing where `fault` is empty, and what is done about it.

    Attributes:
        why_stop: why the run ends, where `action` alone does not say it.
    """

    fault: str
    action: Action
    why_stop: str = ""


class Judge:
    """Judges steps, one after the other, the same on all ranks.

    Args:
        on_nonfinite: what is done about a gradient norm that is not finite.
        max_skipped: so many steps left out in a row end the run.
        spike: what counts as a spike; None judges by finiteness alone.
        window: of the steps before, as `window` gave it.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        on_nonfinite: Literal["stop", "skip"],
        max_skipped: int,
        spike: SpikeConfig | None,
        window: Iterable[Iterable[float]] = (),
    ) -> None:
        self._mesh = mesh
        self._on_nonfinite: Action = on_nonfinite
        self._on_spike: Action = spike.action if spike else "warn"
        self._spikes = Spikes(spike, window) if spike else None
        self._max_skipped, self._skipped = max_skipped, 0

    @property
    def window(self) -> tuple[tuple[float, ...], ...]:
        """What a resumed run needs to judge as this one would have."""
        return self._spikes.window if self._spikes else ()

    def lenient(self) -> Judge:
        """One that has seen the same, and leaves out steps for which this one would end the run."""
        other = copy(self)
        other._on_nonfinite, other._max_skipped = "skip", sys.maxsize
        if other._on_spike == "stop":
            other._on_spike = "skip"
        return other

    def __call__(self, values: Mapping[str, float]) -> Verdict:
        """The verdict on a step of this `loss` and `grad_norm`. Collective where spikes are not only warned of."""
        fault, action = "", self._on_nonfinite
        if not math.isfinite(values["grad_norm"]):
            fault = f"the gradient norm is {values['grad_norm']}"
        elif self._spikes is not None:
            fault, action = self._spikes.judge(values) or "", self._on_spike
            if action != "warn" and self._mesh.largest(bool(fault)):
                fault = fault or "another rank sees a spike"  # all ranks must do the same
        if not fault or action == "warn":
            if self._spikes is not None:
                self._spikes.accept(values)
            self._skipped = 0
            return Verdict(fault, "warn")
        self._skipped += 1
        if action == "skip" and self._skipped >= self._max_skipped:
            why = f"{self._skipped} steps in a row were skipped, as many as train.max_skipped_steps allows; "
            return Verdict(fault, "stop", why)
        return Verdict(fault, action)
