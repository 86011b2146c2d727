"""What an objective is. Each has a file of its own, with its recipe section in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from paralign.models.head_read import HeadOutput, Quantity

from ..batch import Column, Head, Kind, LossSum, PackedBatch, Unit
from ..config.decoding import Section


class Objective(ABC):
    """A loss over packs, built from its section of the recipe.

    Attributes:
        section: the recipe section that it is built from; its name is the objective's.
        reads: what its data are.
        needs: columns that must be filled before the step.
        asks: what the model's head is to give of each loss row: log-probabilities and their like, or values.
        metrics: names of what `loss` measures besides the loss itself, in the order of `LossSum.metrics`.
    """

    section: ClassVar[type[Section]]
    reads: Kind
    needs: frozenset[Column] = frozenset()
    asks: frozenset[Quantity] = frozenset({Quantity.LOGPROB})
    metrics: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def head(self) -> Head:
        """What the model's last layer must be."""
        return Head.SCALAR if Quantity.VALUE in self.asks else Head.LM

    @abstractmethod
    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack.

        Args:
            out: what `asks` named, (R,) each.
        """

    def row_gradient(self, counts: Mapping[Unit, float]) -> float | None:
        """For a loss that is one number times the sum of the log-probabilities, each by its token's weight: that
        number, with the loss divided by its count; None for any other loss."""
        del counts
        return None

    def report(self, sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
        """Metrics by TRL's names, from the sums and counts of everything that was measured."""
        return means(self.metrics, sums_M2)


def means(names: Sequence[str], sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
    """Sum by count for each name; NaN where nothing was counted."""
    return {name: total / count if count else math.nan for name, (total, count) in zip(names, sums_M2)}
