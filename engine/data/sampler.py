"""Which packs form a step, and which rank takes which of them. Owns arithmetic only: no tokens, no files.

A plan's packs are in random order already, so a step is a slice of it: the same samples at any layout. Only
who computes what within the step depends on the layout.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .packing import PackPlan


def steps_per_epoch(n_packs: int, global_batch_size: int) -> int:
    """Steps that take every pack once; the last one may be smaller."""
    return -(-n_packs // global_batch_size)


def packs_of_step(n_packs: int, global_batch_size: int, index: int) -> range:
    """The packs of step `index` of an epoch."""
    return range(index * global_batch_size, min((index + 1) * global_batch_size, n_packs))


def assign(work: Sequence[int], dp_size: int, micro_batch_multiple: int) -> list[list[int | None]]:
    """Deals the packs of a step to the data-parallel ranks.

    Longest first, each to the rank with the least work that still has a place.

    Args:
        work: for each pack, what it costs beyond the linear part that all share: Σl² of its segments.
        micro_batch_multiple: of micro-batches, as the pipeline schedule needs it.

    Returns:
        For each rank as many micro-batches as for any other: an index into `work`, or None for an empty pack.
    """
    places = -(-len(work) // (dp_size * micro_batch_multiple)) * micro_batch_multiple
    ranks: list[list[int | None]] = [[] for _ in range(dp_size)]
    least = [(0, dp_rank) for dp_rank in range(dp_size)]
    for pack in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, dp_rank = heapq.heappop(least)
        ranks[dp_rank].append(pack)
        if len(ranks[dp_rank]) < places:
            heapq.heappush(least, (load + work[pack], dp_rank))
    return [packs + [None] * (places - len(packs)) for packs in ranks]


@dataclass(frozen=True)
class StepStatistics:
    """What a full step of an epoch holds.

    Attributes:
        packs: in an epoch.
        steps: in an epoch, a partial one included.
        utilisation: share of the rows of the packs that are real tokens.
        samples, tokens, loss_tokens: mean and standard deviation per step.
    """

    packs: int
    steps: int
    utilisation: float
    samples: tuple[float, float]
    tokens: tuple[float, float]
    loss_tokens: tuple[float, float]


def step_statistics(
    plan: PackPlan, lengths: np.ndarray, n_loss: np.ndarray, *, tokens_per_pack: int, global_batch_size: int
) -> StepStatistics:
    """Statistics of the full steps of `plan`, or of its only step if that is partial."""
    n_packs = len(plan)
    steps = steps_per_epoch(n_packs, global_batch_size)
    first_packs = np.arange(max(1, n_packs // global_batch_size) + 1) * global_batch_size
    bounds = plan.offsets[np.minimum(first_packs, n_packs)]

    def spread(per_sample: np.ndarray) -> tuple[float, float]:
        before = np.concatenate(([0], np.cumsum(per_sample[plan.sample_ids])))
        per_step = np.diff(before[bounds])
        return float(per_step.mean()), float(per_step.std())

    return StepStatistics(
        packs=n_packs,
        steps=steps,
        utilisation=float(lengths[plan.sample_ids].sum() / (n_packs * tokens_per_pack)),
        samples=spread(np.ones_like(lengths)),
        tokens=spread(lengths),
        loss_tokens=spread(n_loss),
    )
