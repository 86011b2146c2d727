"""CPO: preference optimisation with the likelihood of the chosen answers in place of a reference model."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from paralign.models.head_read import HeadOutput

from ..batch import LossSum, PackedBatch, Unit
from .pairs import PAIR_METRICS, PairLogprobs, PairObjective, pair_rows
from .sections import AnswerSection


class CPOConfig(AnswerSection):
    """Contrastive preference optimisation (arXiv 2401.08417).

    Attributes:
        name: cpo.
        beta: scale of the reward, which is the log-probability of an answer; for ipo the paper's tau.
        loss_type: sigmoid, the paper's; hinge (arXiv 2305.10425) or ipo (2310.12036).
        label_smoothing: share of the labels that are taken to be wrong, below 0.5; sigmoid only.
        cpo_alpha: weight of the chosen answers' negative log-likelihood, averaged over their tokens.
    """

    name: Literal["cpo"]
    beta: float = Field(gt=0)
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    cpo_alpha: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _agree(self) -> CPOConfig:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing is not read by loss_type {self.loss_type}; delete it, or set loss_type: sigmoid"
            )
        return self


class CPO(PairObjective):
    """A loss of Δ = log p(chosen) − log p(rejected) over the step's pairs, and α times the NLL of the chosen answers.

    sigmoid: −(1 − ε) log σ(βΔ) − ε log σ(−βΔ). hinge: max(0, 1 − βΔ). ipo: (Δ − 1/2β)²,
    with log-probabilities, and so rewards and `logps`, per token.
    """

    section = CPOConfig
    metrics = (*PAIR_METRICS, "nll_loss")

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        config: CPOConfig = self.config
        policy = PairLogprobs.of(out, batch)
        logprobs = policy.per_token if config.loss_type == "ipo" else policy.whole
        rewards = logprobs.scaled(config.beta)
        if config.loss_type == "hinge":
            losses = torch.relu(1 - rewards.margin)
        elif config.loss_type == "ipo":
            losses = (logprobs.margin - 1 / (2 * config.beta)) ** 2
        else:
            smoothing, scaled = config.label_smoothing, rewards.margin
            losses = -(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)
        likelihood, row = policy.nll()
        return LossSum(
            {Unit.PAIR: losses.sum().float(), Unit.TOKEN: config.cpo_alpha * likelihood.float()},
            torch.cat((pair_rows(rewards, logprobs), row)),
        )
