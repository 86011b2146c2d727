"""What the objectives over pairs share: the values of both answers, their metrics, the likelihood of the chosen.

Shape suffixes: S segments, P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paralign.models.head_read import HeadOutput

from ..batch import Column, Kind, PackedBatch
from .answers import answer_length, answer_logprob, metric_rows
from .base import Objective

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class PairValues(NamedTuple):
    """One number for the chosen and for the rejected answer of each pair, (P,) each."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """By how much the chosen answer's is greater."""
        return self.chosen - self.rejected

    def scaled(self, factor: float) -> PairValues:
        """Both times `factor`."""
        return PairValues(factor * self.chosen, factor * self.rejected)


def of_pairs(values_S: Tensor, batch: PackedBatch) -> PairValues:
    """The values of the pairs' segments."""
    chosen, rejected = batch.columns[Column.PAIR].unbind(1)
    return PairValues(values_S.index_select(0, chosen), values_S.index_select(0, rejected))


class PairLogprobs(NamedTuple):
    """log p(answer | prompt) of a pack's pairs, and how many tokens the answers have."""

    whole: PairValues
    lengths: PairValues

    @classmethod
    def of(cls, out: HeadOutput, batch: PackedBatch) -> PairLogprobs:
        """From what the head gave."""
        return cls(of_pairs(answer_logprob(out, batch), batch), of_pairs(answer_length(batch), batch))

    @property
    def per_token(self) -> PairValues:
        """The mean over the tokens of each answer."""
        return self.mean(self.whole)

    def mean(self, values: PairValues) -> PairValues:
        """Values of whole answers over their lengths."""
        return PairValues(values.chosen / self.lengths.chosen, values.rejected / self.lengths.rejected)

    def nll(self) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood of the chosen answers; its metric, (1, 2), per token."""
        total = -self.whole.chosen.sum()
        return total, torch.stack((total.detach(), self.lengths.chosen.sum()))[None]


def pair_rows(rewards: PairValues, logprobs: PairValues) -> Tensor:
    """What PAIR_METRICS names, float64 (6, 2), sums and counts; a tie of rewards is no success, as in TRL."""
    right_P = (rewards.chosen > rewards.rejected).double()
    return metric_rows(*rewards, right_P, rewards.margin, *logprobs)


class PairObjective(Objective):
    """An objective over pairs of a chosen and a rejected answer."""

    reads = Kind.PAIRS
    needs = frozenset({Column.PAIR})
    metrics: tuple[str, ...] = PAIR_METRICS
