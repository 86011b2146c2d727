"""What an objective is. Owns the protocol; each objective has a file of its own, its recipe section in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..batch import Column, Head, LossSum, PackedBatch, Unit


class Objective(Protocol):
    """A loss over packs, built from its section of the recipe.

    Attributes:
        needs: columns that must be filled before the step.
        head: what the model's last layer gives.
        metrics: names of what `loss` measures besides the loss itself, in the order of `LossSum.metrics`.
    """

    @property
    def needs(self) -> frozenset[Column]: ...
    @property
    def head(self) -> Head: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...

    def loss(self, out: Tensor, batch: PackedBatch) -> LossSum:
        """Sums over one pack.

        Args:
            out: what the head gave, float32 (T,): log-probabilities of the labels or values, 0 in rows that it
                did not compute.
        """
        ...

    def report(self, sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
        """Metrics by name, from the sums and counts of everything that was measured."""
        ...


@runtime_checkable
class KnownRowGradient(Protocol):
    """An objective whose loss is one number times the sum of what the head gave, each row by its token's weight."""

    def row_gradient(self, counts: Mapping[Unit, float]) -> float | None:
        """That number, with the loss divided by its count; None if it is not known after all."""
        ...


def means(names: Sequence[str], sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
    """Sum by count for each name; NaN where nothing was counted."""
    return {name: total / count if count else math.nan for name, (total, count) in zip(names, sums_M2)}
