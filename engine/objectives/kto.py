"""KTO: answers labelled good or bad one by one. Its baseline is a column of the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from paralign.models.head_read import HeadOutput

from ..batch import Column, Kind, LossSum, PackedBatch, Unit
from .answers import answer_logprob
from .base import Objective, means
from .sections import ReferenceSection


class KTOConfig(ReferenceSection):
    """Kahneman-Tversky optimisation (arXiv 2402.01306).

    Attributes:
        name: kto.
        beta: how strongly the policy is held to the reference.
        desirable_weight: weight of the losses of good answers.
        undesirable_weight: weight of the losses of bad answers.
    """

    name: Literal["kto"]
    beta: float = Field(gt=0)
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)


class KTO(Objective):
    """w (1 − σ(±β (log π/π_ref − z₀))), + for good answers and − for bad, averaged over the step's answers.

    z₀ is the mean, over the whole step, of log π/π_ref for the answer of another sample, and never below 0.
    No gradient flows through it.
    """

    section = KTOConfig
    reads = Kind.LABELLED
    needs = frozenset({Column.DESIRABLE, Column.REF_LOGPROB, Column.BASELINE})
    metrics = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        config, columns = self.config, batch.columns
        logprob_S = answer_logprob(out, batch)
        ratio_S = logprob_S - columns[Column.REF_LOGPROB]
        answers_N, baseline = columns[Column.ANSWERS], columns[Column.BASELINE]
        logprob_N, ratio_N = logprob_S.index_select(0, answers_N), ratio_S.index_select(0, answers_N)
        good_N = columns[Column.DESIRABLE].index_select(0, answers_N)
        sign_N = torch.where(good_N, 1.0, -1.0)
        weight_N = torch.where(good_N, config.desirable_weight, config.undesirable_weight)
        losses_N = weight_N * (1 - torch.sigmoid(config.beta * sign_N * (ratio_N - baseline)))

        def split(values_N: Tensor) -> list[Tensor]:
            values_N = values_N.detach()
            return [
                torch.stack((torch.where(which_N, values_N, 0.0).sum(), which_N.sum().double()))
                for which_N in (good_N, ~good_N)
            ]

        n_answers = float(answers_N.numel())
        kl = torch.stack((baseline, torch.ones_like(baseline))).double() * n_answers
        rows = torch.stack((*split(config.beta * ratio_N), *split(logprob_N), kl))
        return LossSum({Unit.SAMPLE: losses_N.sum().float()}, rows)

    def report(self, sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
        """TRL's names; the margin is between the mean rewards of the two kinds, which are not paired."""
        values = means(self.metrics, sums_M2)
        return values | {"rewards/margins": values["rewards/chosen"] - values["rewards/rejected"]}
