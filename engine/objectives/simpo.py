"""SimPO: preference optimisation by length-normalised likelihood, without a reference model."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

from paralign.models.head_read import HeadOutput

from ..batch import Column, Kind, LossSum, PackedBatch, Unit
from .answers import (
    PAIR_METRICS,
    PairValues,
    answer_length,
    answer_logprob,
    metric_rows,
    of_pairs,
    pair_metrics,
)
from .base import Objective
from .sections import AnswerSection


class SimPOConfig(AnswerSection):
    """SimPO (arXiv 2405.14734).

    Attributes:
        name: simpo.
        beta: scale of the reward, which is the mean log-probability of an answer's tokens.
        gamma: by how much the chosen answer's reward is to exceed the other's.
    """

    name: Literal["simpo"]
    beta: float = Field(gt=0)
    gamma: float = Field(ge=0)


class SimPO(Objective):
    """−log σ(β (log p(chosen)/|chosen| − log p(rejected)/|rejected|) − γ), averaged over the step's pairs."""

    section = SimPOConfig
    reads = Kind.PAIRS
    needs = frozenset({Column.PAIR})
    metrics = PAIR_METRICS

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective. `logps` are per token, as in TRL."""
        per_token = of_pairs(answer_logprob(out, batch) / answer_length(batch), batch)
        rewards = PairValues(self.config.beta * per_token.chosen, self.config.beta * per_token.rejected)
        losses_P = -F.logsigmoid(rewards.chosen - rewards.rejected - self.config.gamma)
        return LossSum({Unit.PAIR: losses_P.sum().float()}, metric_rows(*pair_metrics(rewards, per_token)))
