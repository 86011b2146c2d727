"""What an epoch holds: how often each sample is seen, packed, in steps. Owns weights of sources and step numbers.

Everything is a function of (samples, weights, seed), so that resuming is one integer. N samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from paralign.models.errors import DataError

from .config import DataConfig, SourceConfig
from .packing import PackPlan, plan_packs
from .sampler import steps_per_epoch


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


class Samples(Protocol):
    """What is packed: conversations, or prompts with their answers; see TokenCache."""

    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def n_loss(self) -> np.ndarray: ...
    @property
    def sources(self) -> np.ndarray: ...
    @property
    def origins(self) -> tuple[SourceConfig, ...]: ...
    @property
    def config(self) -> DataConfig: ...
    @property
    def fingerprint(self) -> str: ...
    def place(self, id_: int) -> str: ...


class Epochs:
    """The packs of each epoch, and the steps they are taken in.

    Args:
        global_batch_size: packs in a step.
        seed: of whose turn it is, of packing and of order.

    Raises:
        DataError: weights so small that an epoch may hold no sample.
    """

    def __init__(self, cache: Samples, *, global_batch_size: int, seed: int) -> None:
        self._lengths, self._sources = cache.lengths, cache.sources
        self._weights = [origin.weight for origin in cache.origins]
        # Best-fit decreasing makes as many packs whatever the seed, so that these epochs have as many steps.
        self._alike = all(weight.is_integer() for weight in self._weights)
        self._tokens_per_pack = cache.config.tokens_per_pack
        self._global_batch_size = global_batch_size
        self._seed = seed
        self.plan = lru_cache(maxsize=1)(self._plan)
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
        plan = plan_packs(self._lengths[ids], self._tokens_per_pack, seed=self._seed, epoch=epoch)
        return PackPlan(ids[plan.sample_ids], plan.offsets)
