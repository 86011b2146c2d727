"""A loss curve for each source of the data, beside an objective's own metrics. Owns no loss of its own.

Shape suffixes: T rows of a pack, S segments of it, R rows with a loss, C curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..batch import Column, LossSum, PackedBatch, Unit
from .base import Objective, means


class BySource(Objective):
    """An objective over log-probabilities, and `loss/NAME`: the weighted loss per token of each source's samples.

    Args:
        objective: what is learned; its head gives log-probabilities.
        sources: for each source that `Column.SOURCE` counts, the name of its curve; sources may share one.
    """

    def __init__(self, objective: Objective, sources: Sequence[str]) -> None:
        super().__init__(objective.config)
        names = list(dict.fromkeys(sources))
        self._objective = objective
        self._curve_of = [names.index(name) for name in sources]
        self._curves = tuple(f"loss/{name}" for name in names)
        self.reads, self.needs, self.head = objective.reads, objective.needs, objective.head
        self.metrics = (*objective.metrics, *self._curves)

    def loss(self, out: Tensor, batch: PackedBatch) -> LossSum:
        """Sums over one pack; see Objective."""
        inner = self._objective.loss(out, batch)
        return LossSum(inner.totals, torch.cat((inner.metrics, self._by_source(out.detach(), batch))))

    def row_gradient(self, counts: Mapping[Unit, float]) -> float | None:
        """The objective's own."""
        return self._objective.row_gradient(counts)

    def report(self, sums_M2: Sequence[Sequence[float]]) -> dict[str, float]:
        """The objective's metrics, and the curves of those sources that had a token with a loss."""
        n_inner = len(self._objective.metrics)
        seen = [(name, sums) for name, sums in zip(self._curves, sums_M2[n_inner:]) if sums[1]]
        curves = means([name for name, _ in seen], [sums for _, sums in seen])
        return self._objective.report(sums_M2[:n_inner]) | curves

    def _by_source(self, out_T: Tensor, batch: PackedBatch) -> Tensor:
        """Float64 (C, 2): sums and counts; zeros for a pack of a set that has no sources of its own."""
        if Column.SOURCE not in batch.columns:
            return out_T.new_zeros(len(self._curves), 2, dtype=torch.float64)
        rows_S = batch.segments.cu_seqlens_q.diff().long()
        source_S = batch.columns[Column.SOURCE]
        source_R = source_S.repeat_interleave(rows_S, output_size=out_T.shape[0])[batch.loss_rows]
        curve_R = torch.tensor(self._curve_of, device=out_T.device)[source_R]
        is_of_CR = torch.arange(len(self._curves), device=out_T.device)[:, None] == curve_R
        weight_CR = is_of_CR * batch.weights_R.double()
        loss_R = -out_T.index_select(0, batch.loss_rows).double()
        return torch.stack(((weight_CR * loss_R).sum(1), weight_CR.sum(1)), dim=1)
