"""One step: micro-batches through megatron-core's schedule; each loss divided once, by its global count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paralign.models.mcore import get_forward_backward_func

from .batch import PackedBatch, StepBatch, Unit
from .mesh import Mesh
from .objectives import Objective
from .objectives.base import KnownRowGradient

UNITS = tuple(Unit)


def run_step(
    chunks: Sequence[Any], batch: StepBatch, objective: Objective, mesh: Mesh, *, train: bool
) -> Tensor:
    """Run the forward passes of a step, and, if `train`, the backward passes and the gradient reduction.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism if `train`.
        batch: this rank's packs; every rank has as many, all of one length.

    Returns:
        float64 (len(UNITS) + len(objective.metrics), 2), on every rank: sums and counts over all ranks' packs,
        first of the loss in each unit, then of the metrics. Those of several steps may be added up; `report`
        makes numbers of them.
    """
    totals = mesh.sum_over_data_then_share(run_own(chunks, batch, objective, mesh, train=train))
    totals[: len(UNITS), 1] += torch.tensor([float(batch.counts.get(unit, 0)) for unit in UNITS]).to(totals)
    return totals


def run_own(
    chunks: Sequence[Any], batch: StepBatch, objective: Objective, mesh: Mesh, *, train: bool
) -> Tensor:
    """`run_step` over this rank's packs only: nothing is summed over ranks.

    Returns:
        float64 (len(UNITS) + len(objective.metrics), 2): sums and counts of this rank's packs, the units' counts
        left at 0; all zeros on other stages than the last.
    """
    known = (
        objective.row_gradient(batch.counts) if train and isinstance(objective, KnownRowGradient) else None
    )
    results = _schedule(
        chunks,
        batch.micro_batches,
        partial(_loss, objective=objective, counts=batch.counts),
        train=train,
        row_gradient=known,
    )
    n_rows = len(UNITS) + len(objective.metrics)
    totals = torch.zeros(n_rows, 2, dtype=torch.float64, device=mesh.device)
    if results:
        totals += torch.stack(results).sum(0)
    return totals


def report(objective: Objective, sums: Tensor) -> dict[str, float]:
    """The loss, that is each unit's mean added up, and the objective's metrics, from what `run_step` gave."""
    rows = sums.tolist()
    loss = sum(total / (count or 1.0) for total, count in rows[: len(UNITS)])
    return {"loss": loss, **objective.report(rows[len(UNITS) :])}


def run_forward(
    chunks: Sequence[Any], packs: Sequence[PackedBatch], read: Callable[[Tensor, PackedBatch], Tensor]
) -> list[Tensor]:
    """Run forward passes without gradients.

    Args:
        chunks: this rank's model chunks.
        packs: this rank's; every rank has as many, all of one length.
        read: what to keep of a pack, from what the head gave.

    Returns:
        What was kept, in the order of the packs, on ranks of the last pipeline stage; elsewhere nothing.
    """

    def keep(out: Tensor, *, pack: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        return out.sum(), torch.zeros((), dtype=torch.int, device=out.device), read(out, pack)

    with torch.no_grad():
        return _schedule(chunks, packs, keep, train=False)


def _schedule(
    chunks: Sequence[Any],
    packs: Sequence[PackedBatch],
    loss: Callable[..., Any],
    *,
    train: bool,
    row_gradient: float | None = None,
) -> list[Tensor]:
    """Megatron's schedule over the packs; what `loss` reported of each, on the last stage."""
    iterators = [iter(packs) for _ in chunks]
    results: list[Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward, loss=loss, row_gradient=row_gradient),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(packs),
        seq_length=packs[0].tokens_T.shape[0],
        micro_batch_size=1,
        forward_only=not train,
    )
    return results


def _forward(
    packs: Iterator[PackedBatch], model: Any, *, loss: Callable[..., Any], row_gradient: float | None
) -> tuple[Tensor, Any]:
    pack = next(packs)
    known_R = None if row_gradient is None else row_gradient * pack.weights_R
    out = model(pack.tokens_T, pack.labels_T, pack.loss_rows, pack.segments, known_R)
    return out, partial(loss, pack=pack)


def _loss(
    out: Tensor, *, pack: PackedBatch, objective: Objective, counts: Mapping[Unit, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's triple (loss, token count, report); the count is unused and must be an integer tensor."""
    sums = objective.loss(out, pack)
    divided = [total / (counts[unit] or 1.0) for unit, total in sums.totals.items()]
    measured = torch.zeros(len(UNITS) + sums.metrics.shape[0], 2, dtype=torch.float64, device=out.device)
    for unit, total in sums.totals.items():
        measured[UNITS.index(unit), 0] = total.detach().double()
    measured[len(UNITS) :] = sums.metrics
    return torch.stack(divided).sum(), torch.zeros((), dtype=torch.int, device=out.device), measured
