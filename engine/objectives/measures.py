"""What is measured of a step beside an objective's own metrics: curves of sources, entropy, accuracy.

Shape suffixes: R rows with a loss, S segments of a pack, P pairs, C curves, M metrics.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from paralign.models.head_read import HeadOutput, Quantity

from ..batch import Column, Kind, LossSum, PackedBatch, Unit
from .answers import segments_of_rows
from .base import Objective, means


class Measure(Protocol):
    """Metrics of the loss rows, without gradient."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics."""

    @property
    def asks(self) -> frozenset[Quantity]:
        """What it reads of the head."""

    def sums(self, out: HeadOutput, batch: PackedBatch) -> Tensor:
        """Float64 (len(names), 2): a sum and a count for each metric, over one pack; `out` is detached."""


class Measured(Objective):
    """An objective, and measures beside it. A metric that nothing was counted for is left out.

    Args:
        objective: what is learned; its head is a language model's.
    """

    def __init__(self, objective: Objective, measures: Sequence[Measure]) -> None:
        super().__init__(objective.config)
        self._objective, self._measures = objective, measures
        self.reads, self.needs = objective.reads, objective.needs
        self.asks = objective.asks.union(*(measure.asks for measure in measures))
        self._names = tuple(name for measure in measures for name in measure.names)
        self.metrics = (*objective.metrics, *self._names)

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        inner = self._objective.loss(out, batch)
        given = {quantity: values.detach() for quantity, values in out.items()}
        rows = [measure.sums(given, batch) for measure in self._measures]
        return LossSum(inner.totals, torch.cat((inner.metrics, *rows)))

    def row_gradient(self, counts: Mapping[Unit, float]) -> float | None:
        """The objective's own."""
        return self._objective.row_gradient(counts)

    def report(self, sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
        """The objective's metrics, and those of the measures."""
        n_inner = len(self._objective.metrics)
        seen = [(name, sums) for name, sums in zip(self._names, sums_M2[n_inner:]) if sums[1]]
        measured = means([name for name, _ in seen], [sums for _, sums in seen])
        return self._objective.report(sums_M2[:n_inner]) | measured


def with_measures(objective: Objective, sources: Sequence[str], token_metrics: Collection[str]) -> Objective:
    """The objective, with the metrics that a run shows beside its own.

    Args:
        sources: names of the curves of its data, see LossBySource; none is drawn where all have one name, or where
            the loss is not one over tokens.
        token_metrics: those of `observe.token_metrics`; what is none of the head's is not its matter.
    """
    measures: list[Measure] = []
    if len(set(sources)) > 1 and objective.reads is Kind.CONVERSATIONS:
        measures.append(LossBySource(sources))
    offered: tuple[Measure, ...] = (Entropy(), MeanTokenAccuracy())
    measures += [measure for measure in offered if measure.names[0] in token_metrics]
    return Measured(objective, measures) if measures else objective


class LossBySource:
    """`loss/NAME`: the weighted loss per token of each source's samples.

    Args:
        sources: for each source that `Column.SOURCE` counts, the name of its curve; sources may share one.
    """

    asks = frozenset({Quantity.LOGPROB})

    def __init__(self, sources: Sequence[str]) -> None:
        names = list(dict.fromkeys(sources))
        self.names = tuple(f"loss/{name}" for name in names)
        self._curve_of = torch.tensor([names.index(name) for name in sources])

    def sums(self, out: HeadOutput, batch: PackedBatch) -> Tensor:
        """See Measure; zeros for a pack of a set that has no sources of its own."""
        loss_R = -out[Quantity.LOGPROB].double()
        if Column.SOURCE not in batch.columns:
            return loss_R.new_zeros(len(self.names), 2)
        source_R = batch.columns[Column.SOURCE].index_select(0, segments_of_rows(batch))
        self._curve_of = self._curve_of.to(loss_R.device, non_blocking=True)  # once
        curve_R = self._curve_of.index_select(0, source_R)
        is_of_CR = torch.arange(len(self.names), device=loss_R.device)[:, None] == curve_R
        weight_CR = is_of_CR * batch.weights_R.double()
        return torch.stack(((weight_CR * loss_R).sum(1), weight_CR.sum(1)), dim=1)


class Entropy:
    """`entropy`, as TRL calls it: of the policy's next token, nats, over the learned tokens of all answers."""

    names = ("entropy",)
    asks = frozenset({Quantity.ENTROPY})

    def sums(self, out: HeadOutput, batch: PackedBatch) -> Tensor:
        """See Measure."""
        return _mean_over(out[Quantity.ENTROPY], _of_answers(batch))


class MeanTokenAccuracy:
    """`mean_token_accuracy`, as TRL calls it: the share of learned tokens than which none was likelier.

    Of pairs the chosen answers alone count. A token that shares the first place counts as right, where TRL takes
    the first of them; in fp32 there are none.
    """

    names = ("mean_token_accuracy",)
    asks = frozenset({Quantity.IS_LIKELIEST})

    def sums(self, out: HeadOutput, batch: PackedBatch) -> Tensor:
        """See Measure."""
        counts_R = _of_answers(batch)
        if Column.PAIR in batch.columns:
            none_S = torch.zeros_like(batch.columns[Column.ANSWER], dtype=torch.bool)
            chosen_S = none_S.index_fill(0, batch.columns[Column.PAIR][:, 0], True)
            counts_R = counts_R & chosen_S.index_select(0, segments_of_rows(batch))
        return _mean_over(out[Quantity.IS_LIKELIEST], counts_R)


def _of_answers(batch: PackedBatch) -> Tensor:
    """Bool (R,): rows whose label belongs to an answer; prompts may have labels too."""
    if Column.IN_ANSWER in batch.columns:
        return batch.columns[Column.IN_ANSWER]
    return torch.ones_like(batch.loss_rows, dtype=torch.bool)


def _mean_over(values_R: Tensor, counts_R: Tensor) -> Tensor:
    total = torch.where(counts_R, values_R.double(), 0.0).sum()
    return torch.stack((total, counts_R.sum().double()))[None]
