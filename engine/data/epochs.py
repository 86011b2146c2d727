"""What an epoch holds, which packs form a step, and which rank takes which of them.

Everything is a function of (samples, weights, seed), so that resuming is one integer. A plan's packs are in random
order already, so a step is a slice of it: the same samples at any layout. N samples.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from paralign.models.errors import DataError

from .cache import TokenCache
from .packing import MIXED, PLAIN, PackPlan, plan_packs

_PACKING = "/packing "  # at the end of fingerprints; older ones say nothing of packing


def visits(sources: np.ndarray, weights: Sequence[float], *, seed: int, epoch: int) -> np.ndarray:
    """How often each sample is seen in an epoch; int64 (N,).

    A sample of a source of weight w is seen ⌊w⌋ or ⌈w⌉ times in each epoch, and ⌊E·w⌋ or ⌈E·w⌉ times in the
    first E epochs: none comes a second time before all the others of its source came once. The source's n
    samples are seen n·w times an epoch, give or take one. The seed decides whose turn it is.

    Args:
        sources: int (N,), index of each sample's source into `weights`.
    """
    seen = np.zeros(len(sources), dtype=np.int64)
    for source, weight in enumerate(weights):
        ids = np.flatnonzero(sources == source)
        key = hashlib.sha256(f"{seed} {source}".encode()).digest()
        turn = np.random.default_rng(int.from_bytes(key[:8], "big")).permutation(len(ids))
        ahead = (turn + 0.5) / max(1, len(ids))  # in (0, 1): how much earlier than the last a sample is due
        seen[ids] = np.floor((epoch + 1) * weight + ahead) - np.floor(epoch * weight + ahead)
    return seen


def with_packing(fingerprint: str, packing: int) -> str:
    """A fingerprint of samples and steps that says how they are packed, as `packing_of` reads it."""
    return fingerprint if packing == PLAIN else f"{fingerprint}{_PACKING}{packing}"


def packing_of(fingerprint: str) -> int:
    """The version of the plans of a run that was saved with this fingerprint."""
    return MIXED if _PACKING in fingerprint else PLAIN


class Epochs:
    """The packs of each epoch, and the steps they are taken in.

    Args:
        global_batch_size: packs in a step.
        seed: of whose turn it is, of packing and of order.
        packing: version of the plans, see `plan_packs`.

    Raises:
        DataError: weights so small that an epoch may hold no sample.
    """

    def __init__(self, cache: TokenCache, *, global_batch_size: int, seed: int, packing: int = MIXED) -> None:
        self._lengths, self._sources = cache.lengths, cache.sources
        self._weights = [origin.weight for origin in cache.origins]
        # All samples at once make as many packs whatever the seed, so that these epochs have as many steps.
        self._alike = packing == PLAIN and all(weight.is_integer() for weight in self._weights)
        self._tokens_per_pack = cache.config.tokens_per_pack
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._packing = packing
        # Two: the next step may be the first of an epoch while the last of the one before is still counted.
        self.plan = lru_cache(maxsize=2)(self._plan)
        self._first_steps = [0]  # of epoch 0, 1, … as far as they were asked for

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch, which is also how many steps all epochs before it have."""
        first_steps = self._first_steps
        while len(first_steps) <= (min(epoch, 1) if self._alike else epoch):
            n_packs = len(self.plan(len(first_steps) - 1))
            first_steps.append(first_steps[-1] + steps_per_epoch(n_packs, self._global_batch_size))
        return epoch * first_steps[1] if self._alike and epoch else first_steps[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number within it."""
        epoch = step // self.first_step(1)
        while self.first_step(epoch) > step:
            epoch -= 1
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self.first_step(epoch)

    def _plan(self, epoch: int) -> PackPlan:
        """The packs of an epoch; sample ids are those of the cache."""
        times = visits(self._sources, self._weights, seed=self._seed, epoch=epoch)
        ids = np.repeat(np.arange(len(times)), times)
        if not len(ids):
            raise DataError(
                f"data.train: with weights {self._weights} epoch {epoch} holds no sample; raise the weights"
            )
        plan = plan_packs(
            self._lengths[ids], self._tokens_per_pack, seed=self._seed, epoch=epoch, version=self._packing
        )
        return PackPlan(ids[plan.sample_ids], plan.offsets)


def steps_per_epoch(n_packs: int, global_batch_size: int) -> int:
    """Steps that take every pack once; the last one may be smaller."""
    return -(-n_packs // global_batch_size)


def packs_of_step(n_packs: int, global_batch_size: int, index: int) -> range:
    """The packs of step `index` of an epoch."""
    return range(index * global_batch_size, min((index + 1) * global_batch_size, n_packs))


@dataclass(frozen=True)
class Share:
    """What one data-parallel rank takes of each step.

    Attributes:
        rank, size: which of how many.
        micro_batch_multiple: of micro-batches, as the pipeline schedule needs it.
    """

    rank: int
    size: int
    micro_batch_multiple: int

    def of(self, packs: Sequence[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
        """This rank's packs of a step: the samples of each, none in an empty one.

        Args:
            packs: the samples of each pack of the step.
            lengths: rows of every sample.
        """
        work = [int(np.square(lengths[ids]).sum()) for ids in packs]
        mine = assign(work, self.size, self.micro_batch_multiple)[self.rank]
        return [packs[i] if i is not None else packs[0][:0] for i in mine]

    def of_plan(self, plan: PackPlan, lengths: np.ndarray, packs_per_step: int) -> Iterator[list[np.ndarray]]:
        """This rank's packs of every step of a plan."""
        for index in range(steps_per_epoch(len(plan), packs_per_step)):
            yield self.of([plan.pack(i) for i in packs_of_step(len(plan), packs_per_step, index)], lengths)


def assign(work: Sequence[int], size: int, micro_batch_multiple: int) -> list[list[int | None]]:
    """Deals the packs of a step to the data-parallel ranks.

    Longest first, each to the rank with the least work that still has a place.

    Args:
        work: for each pack, what it costs beyond the linear part that all share: Σl² of its segments.
        micro_batch_multiple: of micro-batches, as the pipeline schedule needs it.

    Returns:
        For each rank as many micro-batches as for any other: an index into `work`, or None for an empty pack.
    """
    places = -(-len(work) // (size * micro_batch_multiple)) * micro_batch_multiple
    ranks: list[list[int | None]] = [[] for _ in range(size)]
    least = [(0, rank) for rank in range(size)]
    for pack in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, rank = heapq.heappop(least)
        ranks[rank].append(pack)
        if len(ranks[rank]) < places:
            heapq.heappush(least, (load + work[pack], rank))
    return [packs + [None] * (places - len(packs)) for packs in ranks]


@dataclass(frozen=True)
class StepStatistics:
    """What a full step of an epoch holds.

    Attributes:
        packs: in an epoch.
        steps: in an epoch, a partial one included.
        utilisation: share of the rows of the packs that are real tokens.
        samples, loss_tokens: mean and standard deviation per step.
    """

    packs: int
    steps: int
    utilisation: float
    samples: tuple[float, float]
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
        loss_tokens=spread(n_loss),
    )
