"""The reward model: Bradley-Terry on pairs plus squared error against absolute scores, where there are any.

Shape suffixes: T rows of a pack, S segments, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from paralign.models.head_read import HeadOutput, Quantity

from ..batch import Column, LossSum, PackedBatch, Unit
from .answers import metric_rows, segment_sums
from .base import means
from .pairs import PairObjective, of_pairs
from .sections import AnswerSection

# Confidence of a pair is σ(|r_w − r_l|), from a half to one.
BINS = ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.0))


class RewardConfig(AnswerSection):
    """A reward model: a scalar head on the last token of each answer.

    Attributes:
        name: reward.
        alpha: weight of the squared error against absolute scores; 0 ignores them. Pairs without scores have none.
        score_range: lowest and highest score in the data, taken to −1 and 1; needed with alpha.
        center_rewards_coefficient: weight of (r_w + r_l)², which keeps rewards about 0 (arXiv 2312.09244).
    """

    name: Literal["reward"]
    alpha: float = Field(ge=0)
    score_range: tuple[float, float] | None = None
    center_rewards_coefficient: float | None = Field(None, gt=0)

    @property
    def range_of_scores(self) -> tuple[float, float] | None:
        """See AnswerSection."""
        return self.score_range

    @model_validator(mode="after")
    def _agree(self) -> RewardConfig:
        if self.alpha and self.score_range is None:
            raise ValueError("alpha needs score_range; give the lowest and the highest score, such as [1, 5]")
        if not self.alpha and self.score_range is not None:
            raise ValueError("score_range is not read where alpha is 0; delete it, or set alpha")
        if self.score_range is not None and self.score_range[0] >= self.score_range[1]:
            raise ValueError(f"score_range: {list(self.score_range)} is empty; give the lowest score first")
        return self


class Reward(PairObjective):
    """−log σ(r_w − r_l − m) + α [(r_w − s_w)² + (r_l − s_l)²] + c (r_w + r_l)², averaged over the step's pairs.

    r rewards of the chosen and the rejected answer, s their normalised scores, m the pair's margin. α is 0 in a
    pair without scores (Baichuan Alignment Technical Report, arXiv 2410.14940).
    """

    section = RewardConfig
    needs = frozenset({Column.PAIR, Column.SCORE, Column.MARGIN})
    asks = frozenset({Quantity.VALUE})
    metrics = (
        "accuracy",
        "margin",
        "mean_reward",
        "score_mse",
        *(
            f"calibration/{low:.1f}-{high:.1f}/{what}"
            for low, high in BINS
            for what in ("confidence", "accuracy")
        ),
    )

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        chosen, rejected = of_pairs(segment_sums(out[Quantity.VALUE], batch), batch)
        scores = of_pairs(batch.columns[Column.SCORE], batch)
        margin_P = chosen - rejected
        losses_P = -F.logsigmoid(margin_P - batch.columns[Column.MARGIN])
        scored_P = ~(scores.chosen.isnan() | scores.rejected.isnan())
        squares_P = torch.where(
            scored_P,
            (chosen - scores.chosen.nan_to_num()) ** 2 + (rejected - scores.rejected.nan_to_num()) ** 2,
            0.0,
        )
        losses_P = losses_P + self.config.alpha * squares_P
        if self.config.center_rewards_coefficient:
            losses_P = losses_P + self.config.center_rewards_coefficient * (chosen + rejected) ** 2

        right_P = (margin_P > 0).double()
        confidence_P = torch.sigmoid(margin_P.detach().abs()).double()
        rows = [metric_rows(right_P, margin_P, torch.cat((chosen, rejected)))]
        rows.append(torch.stack((squares_P.detach().double().sum(), 2.0 * scored_P.sum().double()))[None])
        for low, high in BINS:
            inside_P = (confidence_P >= low) & ((confidence_P < high) | (high == 1.0))
            count = inside_P.sum().double()
            for values_P in (confidence_P, right_P):
                rows.append(torch.stack((torch.where(inside_P, values_P, 0.0).sum(), count))[None])
        return LossSum({Unit.PAIR: losses_P.sum()}, torch.cat(rows))

    def report(self, sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
        """TRL's names, the reliability table, and the expected calibration error that sums it up.

        A bin without pairs is left out, as is `score_mse` where no pair has scores.
        """
        values = {name: value for name, value in means(self.metrics, sums_M2).items() if value == value}
        table = list(zip(self.metrics, sums_M2))[4:]
        error = sum(
            abs(right[0] - confidence[0]) for (_, confidence), (_, right) in zip(table[::2], table[1::2])
        )
        if n_pairs := sums_M2[0][1]:
            values["calibration_error"] = error / n_pairs
        return values
