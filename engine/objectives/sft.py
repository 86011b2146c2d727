"""Supervised fine-tuning: negative log-likelihood of the labelled tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from ..batch import Column, Head, LossSum, PackedBatch, Unit
from ..config import Section


class SFTConfig(Section):
    """Supervised fine-tuning.

    Attributes:
        name: sft.
    """

    name: Literal["sft"] = "sft"


class SFT:
    """−Σ w log p(label) / Σ w over the loss tokens of the whole step; w is 1 where data say no other."""

    needs: frozenset[Column] = frozenset()
    head = Head.LM
    metrics: tuple[str, ...] = ()

    def __init__(self, config: SFTConfig | None = None) -> None:
        del config  # it has no key but its name

    def loss(self, out: Tensor, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        total = -(out * batch.weights_T).sum()
        return LossSum({Unit.TOKEN: total}, total.new_zeros(0, 2).double())

    def row_gradient(self, counts: Mapping[Unit, float]) -> float:
        """See KnownRowGradient."""
        return -1 / (counts[Unit.TOKEN] or 1)

    def report(self, sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
        """Nothing but the loss."""
        return {}
