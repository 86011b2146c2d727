"""Direct preference optimisation and its relatives. What the reference model says, columns/fillers.py fills in."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from paralign.models.head_read import HeadOutput

from ..batch import Column, LossSum, PackedBatch, Unit
from .pairs import PAIR_METRICS, PairLogprobs, PairObjective, PairValues, of_pairs, pair_rows
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


class DPO(PairObjective):
    """A loss of Δ = log π/π_ref (chosen) − log π/π_ref (rejected), averaged over the pairs of the step.

    sigmoid: −log σ(βΔ). hinge: max(0, 1 − βΔ). robust: ((1 − ε)(−log σ(βΔ)) + ε log σ(−βΔ)) / (1 − 2ε).
    ipo: (Δ' − 1/2β)², where Δ' takes each log-ratio per token, as its authors advise.
    """

    section = DPOConfig
    needs = frozenset({Column.PAIR, Column.REF_LOGPROB})

    def __init__(self, config: DPOConfig) -> None:
        super().__init__(config)
        self.metrics = (*PAIR_METRICS, *(("nll_loss",) if config.sft_weight else ()))

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        policy, theirs = PairLogprobs.of(out, batch), of_pairs(batch.columns[Column.REF_LOGPROB], batch)
        ratios = PairValues(policy.whole.chosen - theirs.chosen, policy.whole.rejected - theirs.rejected)
        compared = policy.mean(ratios) if self.config.loss_type == "ipo" else ratios
        totals = {Unit.PAIR: self._losses(compared.margin).sum().float()}
        rows = pair_rows(ratios.scaled(self.config.beta), policy.whole)
        if self.config.sft_weight:
            likelihood, row = policy.nll()
            totals[Unit.TOKEN] = self.config.sft_weight * likelihood.float()
            rows = torch.cat((rows, row))
        return LossSum(totals, rows)

    def _losses(self, delta_P: Tensor) -> Tensor:
        beta, epsilon = self.config.beta, self.config.label_smoothing
        scaled = beta * delta_P
        if self.config.loss_type == "ipo":
            return (delta_P - 1 / (2 * beta)) ** 2
        if self.config.loss_type == "hinge":
            return torch.relu(1 - scaled)
        if epsilon is not None:
            return (epsilon * F.logsigmoid(-scaled) - (1 - epsilon) * F.logsigmoid(scaled)) / (
                1 - 2 * epsilon
            )
        return -F.logsigmoid(scaled)
