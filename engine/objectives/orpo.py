"""ORPO: likelihood of the chosen conversation and an odds ratio of the answers, without a reference model."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from paralign.models.head_read import HeadOutput, Quantity

from ..batch import Column, LossSum, PackedBatch, Unit
from .answers import metric_rows, segment_sums
from .pairs import PAIR_METRICS, PairLogprobs, PairObjective, of_pairs, pair_rows
from .sections import AnswerSection


class ORPOConfig(AnswerSection):
    """Odds-ratio preference optimisation (arXiv 2403.07691).

    Attributes:
        name: orpo.
        beta: weight of the odds ratio, the paper's lambda.
    """

    name: Literal["orpo"]
    beta: float = Field(gt=0)


class ORPO(PairObjective):
    """NLL of prompt and chosen answer per token, minus β log σ(log odds ratio) per pair.

    The odds of an answer are p / (1 − p) with p = exp(mean log-probability of its tokens).
    """

    section = ORPOConfig
    needs = frozenset({Column.PAIR, Column.IN_ANSWER})
    metrics = (*PAIR_METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen")

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective. `logps` are per token, as in TRL."""
        logprob_R = out[Quantity.LOGPROB].double()
        likelihood = -of_pairs(segment_sums(logprob_R, batch), batch).chosen.sum()
        n_tokens = of_pairs(segment_sums(torch.ones_like(logprob_R), batch), batch).chosen.sum()
        per_token = PairLogprobs.of(out, batch).per_token
        log_odds_P = per_token.margin - (_log1mexp(per_token.chosen) - _log1mexp(per_token.rejected))
        ratio_P = F.logsigmoid(log_odds_P)
        beta = self.config.beta
        nll_row = torch.stack((likelihood.detach(), n_tokens))[None]
        return LossSum(
            {Unit.TOKEN: likelihood.float(), Unit.PAIR: -beta * ratio_P.sum().float()},
            torch.cat(
                (pair_rows(per_token.scaled(beta), per_token), nll_row, metric_rows(ratio_P, log_odds_P))
            ),
        )


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, by whichever of two forms keeps its digits; finite for an answer of probability 1."""
    x = x.clamp(max=-1e-12)
    near_zero = x > -math.log(2)
    # Each branch sees only arguments it is good for: a gradient of the unused one must not be NaN.
    close = torch.log(-torch.expm1(torch.where(near_zero, x, -0.5)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, close, far)
