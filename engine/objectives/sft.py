"""Supervised fine-tuning: negative log-likelihood of the labelled tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from paralign.models.head_read import HeadOutput, Quantity

from ..batch import Kind, LossSum, PackedBatch, Unit
from ..config.decoding import Section
from .base import Objective


class SFTConfig(Section):
    """Supervised fine-tuning.

    Attributes:
        name: sft.
    """

    name: Literal["sft"] = "sft"


class SFT(Objective):
    """−Σ w log p(label) / Σ w over the loss tokens of the whole step; w is 1 where data say no other."""

    section = SFTConfig
    reads = Kind.CONVERSATIONS

    def __init__(self, config: SFTConfig | None = None) -> None:
        super().__init__(config or SFTConfig())

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        zeros_T = torch.zeros_like(batch.weights_T)
        total = -(zeros_T.index_put((batch.loss_rows,), out[Quantity.LOGPROB]) * batch.weights_T).sum()
        return LossSum({Unit.TOKEN: total}, total.new_zeros(0, 2).double())

    def row_gradient(self, counts: Mapping[Unit, float]) -> float:
        """See Objective."""
        return -1 / (counts[Unit.TOKEN] or 1)
