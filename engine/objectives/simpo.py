"""SimPO: preference optimisation by length-normalised likelihood, without a reference model."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

from paralign.models.head_read import HeadOutput

from ..batch import LossSum, PackedBatch, Unit
from .pairs import PairLogprobs, PairObjective, pair_rows
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


class SimPO(PairObjective):
    """−log σ(β (log p(chosen)/|chosen| − log p(rejected)/|rejected|) − γ), averaged over the step's pairs."""

    section = SimPOConfig

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective. `logps` are per token, as in TRL."""
        per_token = PairLogprobs.of(out, batch).per_token
        rewards = per_token.scaled(self.config.beta)
        losses_P = -F.logsigmoid(rewards.margin - self.config.gamma)
        return LossSum({Unit.PAIR: losses_P.sum().float()}, pair_rows(rewards, per_token))
