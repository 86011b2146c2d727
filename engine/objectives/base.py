"""What an objective is. Owns the protocol; each objective has a file of its own."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..batch import Column, LossSum, PackedBatch


class Objective(Protocol):
    """A loss over packs.

    Attributes:
        needs: columns that must be filled before the step.
        metrics: names of what `loss` measures, in the order of `LossSum.metrics`; the first is "loss".
    """

    needs: frozenset[Column]
    metrics: tuple[str, ...]

    def loss(self, out: Tensor, batch: PackedBatch) -> LossSum:
        """Sums over one pack.

        Args:
            out: what the head gave: float32 (T,) log-probabilities of the labels, 0 where there is none.
        """
        ...
