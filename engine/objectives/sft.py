"""Supervised fine-tuning: negative log-likelihood of the labelled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Column, LossSum, PackedBatch, Unit


class SFT:
    """−Σ log p(label), averaged over the loss tokens of the whole step: every token counts the same."""

    needs: frozenset[Column] = frozenset()
    metrics: tuple[str, ...] = ("loss",)

    def loss(self, out: Tensor, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        total = -out.sum()
        count = total.new_tensor(batch.loss_rows.numel())
        return LossSum({Unit.TOKEN: total}, torch.stack((total.detach(), count)).double()[None])
