"""One step: micro-batches through megatron-core's schedule; each loss divided once, by its global count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paralign.models.mcore import get_forward_backward_func

from .batch import PackedBatch, StepBatch, Unit
from .mesh import Mesh
from .objectives import Objective


def run_step(
    chunks: Sequence[Any], batch: StepBatch, objective: Objective, mesh: Mesh, *, train: bool
) -> Tensor:
    """Run the forward passes of a step, and, if `train`, the backward passes and the gradient reduction.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism if `train`.
        batch: this rank's packs; every rank has as many, all of one length.

    Returns:
        float64 (len(objective.metrics), 2), sums and counts over all ranks' packs, on every rank.
    """
    packs = batch.micro_batches
    iterators = [iter(packs) for _ in chunks]
    results: list[Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward, objective=objective, counts=batch.counts),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(packs),
        seq_length=packs[0].tokens_T.shape[0],
        micro_batch_size=1,
        forward_only=not train,
    )
    totals = torch.zeros(len(objective.metrics), 2, dtype=torch.float64, device=mesh.device)
    if results:
        totals += torch.stack(results).sum(0)
    return mesh.sum_over_data_then_share(totals)


def _forward(
    packs: Iterator[PackedBatch], model: Any, *, objective: Objective, counts: Mapping[Unit, int]
) -> tuple[Tensor, Any]:
    pack = next(packs)
    out = model(pack.tokens_T, pack.labels_T, pack.loss_rows, pack.segments)
    return out, partial(_loss, pack=pack, objective=objective, counts=counts)


def _loss(
    out: Tensor, *, pack: PackedBatch, objective: Objective, counts: Mapping[Unit, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's triple (loss, token count, report); the count is unused and must be an integer tensor."""
    sums = objective.loss(out, pack)
    divided = [total / max(1, counts[unit]) for unit, total in sums.totals.items()]
    return torch.stack(divided).sum(), torch.zeros((), dtype=torch.int, device=out.device), sums.metrics
