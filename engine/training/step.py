"""One step: an objective over the packs of all ranks; each loss divided once, by its global count."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from paralign.models.head_read import HeadOutput

from ..batch import PackedBatch, StepBatch, Unit
from ..objectives import Objective
from .model import Model

UNITS = tuple(Unit)


def run_step(model: Model, batch: StepBatch, objective: Objective, *, train: bool) -> Tensor:
    """Run the forward passes of a step, and, if `train`, the backward passes and the gradient reduction.

    Args:
        model: prepared to train if `train`.
        batch: this rank's packs; every rank has as many, all of one length.

    Returns:
        float64 (len(UNITS) + len(objective.metrics), 2), on every rank: sums and counts over all ranks' packs,
        first of the loss in each unit, then of the metrics. Those of several steps may be added up; `report`
        makes numbers of them.
    """
    totals = model.mesh.sum_over_data_then_share(run_own(model, batch, objective, train=train))
    totals[: len(UNITS), 1] += torch.tensor([float(batch.counts.get(unit, 0)) for unit in UNITS]).to(totals)
    return totals


def run_own(model: Model, batch: StepBatch, objective: Objective, *, train: bool) -> Tensor:
    """`run_step` over this rank's packs only: nothing is summed over ranks.

    Returns:
        float64 (len(UNITS) + len(objective.metrics), 2): sums and counts of this rank's packs, the units' counts
        left at 0; all zeros on other stages than the last.
    """
    known = objective.row_gradient(batch.counts) if train else None
    results = model.run(
        batch.micro_batches,
        partial(PackedBatch.read, quantities=objective.asks, row_gradient=known),
        partial(_loss, objective=objective, counts=batch.counts),
        train=train,
    )
    n_rows = len(UNITS) + len(objective.metrics)
    totals = torch.zeros(n_rows, 2, dtype=torch.float64, device=model.mesh.device)
    if results:
        totals += torch.stack(results).sum(0)
    return totals


def report(objective: Objective, sums: Tensor) -> dict[str, float]:
    """The loss, that is each unit's mean added up, and the objective's metrics, from what `run_step` gave."""
    rows = sums.tolist()
    loss = sum(total / (count or 1.0) for total, count in rows[: len(UNITS)])
    return {"loss": loss, **objective.report(rows[len(UNITS) :])}


def _loss(
    out: HeadOutput, *, pack: PackedBatch, objective: Objective, counts: Mapping[Unit, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's triple (loss, token count, report); the count is unused and must be an integer tensor."""
    sums = objective.loss(out, pack)
    divided = [total / (counts[unit] or 1.0) for unit, total in sums.totals.items()]
    measured = torch.zeros(
        len(UNITS) + sums.metrics.shape[0], 2, dtype=torch.float64, device=sums.metrics.device
    )
    for unit, total in sums.totals.items():
        measured[UNITS.index(unit), 0] = total.detach().double()
    measured[len(UNITS) :] = sums.metrics
    return torch.stack(divided).sum(), torch.zeros((), dtype=torch.int, device=measured.device), measured
