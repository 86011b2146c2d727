"""From a plan to this rank's packs of a step. Owns no tensor's making and not which samples share a pack.

S segments of a pack (samples, then the tail).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..batch import Column, PackedBatch, StepBatch, Unit
from .cache import TokenCache
from .epochs import Epochs, Samples
from .pack import Piece, build_pack
from .sampler import assign, packs_of_step

NO_SOURCE = -1  # in Column.SOURCE: a segment of padding

Sample = tuple[np.ndarray, np.ndarray]  # tokens (L,) of any integer type; learned (L,), 1 where predicted


def pack_batch(samples: Sequence[Sample], tokens_per_pack: int, device: torch.device) -> PackedBatch:
    """One pack of the given samples, in the given order; see `build_pack`. No sample is an empty pack.

    Raises:
        ValueError: the samples are longer than the pack.
    """
    return build_pack([Piece(tokens, learned) for tokens, learned in samples], tokens_per_pack, device)


class StepLoader(ABC):
    """The steps of one data-parallel rank, over any number of epochs; subclasses make the packs.

    A step is a pure function of its number: resuming is asking for it.

    Attributes:
        epochs: which packs each epoch holds.

    Args:
        global_batch_size: packs in a step, over all ranks.
        seed: of the order of samples; the same on all ranks.
        micro_batch_multiple: of micro-batches, as the pipeline schedule needs it.
    """

    def __init__(
        self,
        cache: Samples,
        *,
        global_batch_size: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
        micro_batch_multiple: int,
        device: torch.device,
    ) -> None:
        self.cache = cache
        self._tokens_per_pack = cache.config.tokens_per_pack
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._micro_batch_multiple = micro_batch_multiple
        self._device = device
        self.epochs = Epochs(cache, global_batch_size=global_batch_size, seed=seed)

    @property
    def fingerprint(self) -> str:
        """Names the sequence of steps: equal fingerprints give equal samples to equal step numbers."""
        return f"{self.cache.fingerprint}/{self._global_batch_size}/{self._seed}"

    def step(self, step: int) -> StepBatch:
        """Step number `step`, from 0, over all epochs; tensors of this rank, counts of all."""
        epoch, index = self.epochs.locate(step)
        plan = self.epochs.plan(epoch)
        lengths = self.cache.lengths
        packs = [plan.pack(i) for i in packs_of_step(len(plan), self._global_batch_size, index)]
        work = [int(np.square(lengths[ids]).sum()) for ids in packs]
        mine = assign(work, self._dp_size, self._micro_batch_multiple)[self._dp_rank]
        ids = np.concatenate(packs)
        shares = [packs[i] if i is not None else ids[:0] for i in mine]
        return StepBatch(
            micro_batches=[self._batch(share) for share in shares],
            counts=self._counts(ids),
            n_samples=len(ids),
            n_tokens=int(lengths[ids].sum()),
            sample_ids=tuple(ids.tolist()),
            pack_samples=[share.tolist() for share in shares],
        )

    def pack_of(self, ids: Sequence[int]) -> PackedBatch:
        """A pack of the given samples alone."""
        return self._batch(np.array(ids, dtype=np.int64))

    def evaluation(self) -> Iterator[StepBatch]:
        """Every sample once, in the order of the first epoch: the same each time."""
        return map(self.step, range(self.epochs.first_step(1)))

    @abstractmethod
    def _counts(self, ids: np.ndarray) -> dict[Unit, int]:
        """What losses over these samples are divided by."""

    @abstractmethod
    def _batch(self, ids: np.ndarray) -> PackedBatch:
        """The pack of these samples."""


class PackLoader(StepLoader):
    """Steps of conversations; see StepLoader."""

    def __init__(self, cache: TokenCache, **options: Any) -> None:
        super().__init__(cache, **options)
        self._conversations = cache

    def _counts(self, ids: np.ndarray) -> dict[Unit, int]:
        return {Unit.TOKEN: int(self._conversations.n_loss[ids].sum()), Unit.SAMPLE: len(ids)}

    def _batch(self, ids: np.ndarray) -> PackedBatch:
        samples = [self._conversations.sample(id_) for id_ in ids.tolist()]
        batch = pack_batch(samples, self._tokens_per_pack, self._device)
        if len(self.cache.origins) > 1:
            batch.columns = {Column.SOURCE: source_column(batch, self.cache.sources[ids], self._device)}
        return batch


def source_column(batch: PackedBatch, sources: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 (S,): the source of each segment, for the first of them as given, then padding."""
    sources_S = np.full(len(batch.segments.bounds), NO_SOURCE)
    sources_S[: len(sources)] = sources
    return torch.from_numpy(sources_S).to(device)
