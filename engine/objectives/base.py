"""What an objective is. Owns the interface; each objective has a file of its own, its recipe section in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..batch import Column, Head, Kind, LossSum, PackedBatch, Unit
from ..config import Section


class Objective(ABC):
    """A loss over packs, built from its section of the recipe.

    Attributes:
        section: the recipe section that it is built from; its name is the objective's.
        reads: what its data are.
        needs: columns that must be filled before the step.
        head: what the model's last layer gives.
        metrics: names of what `loss` measures besides the loss itself, in the order of `LossSum.metrics`.
    """

    section: ClassVar[type[Section]]
    reads: Kind
    needs: frozenset[Column] = frozenset()
    head: Head = Head.LM
    metrics: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def loss(self, out: Tensor, batch: PackedBatch) -> LossSum:
        """Sums over one pack.

        Args:
            out: what the head gave, float32 (T,): log-probabilities of the labels or values, 0 in rows that it
                did not compute.
        """

    def row_gradient(self, counts: Mapping[Unit, float]) -> float | None:
        """For a loss that is one number times the sum of what the head gave, each row by its token's weight: that
        number, with the loss divided by its count; None for any other loss."""
        del counts
        return None

    def report(self, sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
        """Metrics by TRL's names, from the sums and counts of everything that was measured."""
        return means(self.metrics, sums_M2)


def means(names: Sequence[str], sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
    """Sum by count for each name; NaN where nothing was counted."""
    return {name: total / count if count else math.nan for name, (total, count) in zip(names, sums_M2)}
