"""Direct preference optimisation and its relatives with a reference model. Owns the losses, not the reference."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

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
from .sections import ReferenceSection


class DPOConfig(ReferenceSection):
    """Direct preference optimisation: the answers chosen become likelier than under a reference model.

    Attributes:
        name: dpo.
        beta: how strongly the policy is held to the reference; for ipo the paper's tau.
        loss_type: sigmoid (arXiv 2305.18290), hinge (2305.10425), ipo (2310.12036) or robust (2403.00409).
        label_smoothing: share of the labels that are taken to be wrong, below 0.5; robust only, and needed there.
        sft_weight: weight of the chosen answers' negative log-likelihood, averaged over their tokens.
    """

    name: Literal["dpo"]
    beta: float = Field(gt=0)
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: float | None = Field(None, gt=0, lt=0.5)
    sft_weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _agree(self) -> DPOConfig:
        if self.loss_type == "robust" and self.label_smoothing is None:
            raise ValueError("loss_type robust needs label_smoothing; give the share of wrong labels")
        if self.loss_type != "robust" and self.label_smoothing is not None:
            raise ValueError(
                f"label_smoothing is not read by loss_type {self.loss_type}; delete it, or set loss_type: robust"
            )
        return self


class DPO(Objective):
    """A loss of Δ = log π/π_ref (chosen) − log π/π_ref (rejected), averaged over the pairs of the step.

    sigmoid: −log σ(βΔ). hinge: max(0, 1 − βΔ). robust: ((1 − ε)(−log σ(βΔ)) + ε log σ(−βΔ)) / (1 − 2ε).
    ipo: (Δ' − 1/2β)², where Δ' takes each log-ratio per token, as its authors advise.
    """

    section = DPOConfig
    reads = Kind.PAIRS
    needs = frozenset({Column.PAIR, Column.REF_LOGPROB})

    def __init__(self, config: DPOConfig) -> None:
        super().__init__(config)
        self.metrics = (*PAIR_METRICS, *(("nll_loss",) if config.sft_weight else ()))

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        logprob_S = answer_logprob(out, batch)
        ratio_S = logprob_S - batch.columns[Column.REF_LOGPROB]
        logprobs, ratios = of_pairs(logprob_S, batch), of_pairs(ratio_S, batch)
        rewards = PairValues(self.config.beta * ratios.chosen, self.config.beta * ratios.rejected)
        totals = {Unit.PAIR: self._losses(ratios, batch).sum().float()}
        measured = pair_metrics(rewards, logprobs)
        rows = metric_rows(*measured)
        if self.config.sft_weight:
            likelihood = -logprobs.chosen.sum()
            totals[Unit.TOKEN] = self.config.sft_weight * likelihood.float()
            n_tokens = of_pairs(answer_length(batch), batch).chosen.sum()
            rows = torch.cat((rows, torch.stack((likelihood.detach(), n_tokens))[None]))
        return LossSum(totals, rows)

    def _losses(self, ratios: PairValues, batch: PackedBatch) -> Tensor:
        beta, epsilon = self.config.beta, self.config.label_smoothing
        if self.config.loss_type == "ipo":
            lengths = of_pairs(answer_length(batch), batch)
            per_token = ratios.chosen / lengths.chosen - ratios.rejected / lengths.rejected
            return (per_token - 1 / (2 * beta)) ** 2
        scaled = beta * (ratios.chosen - ratios.rejected)
        if self.config.loss_type == "hinge":
            return torch.relu(1 - scaled)
        if epsilon is not None:
            return (epsilon * F.logsigmoid(-scaled) - (1 - epsilon) * F.logsigmoid(scaled)) / (
                1 - 2 * epsilon
            )
        return -F.logsigmoid(scaled)
