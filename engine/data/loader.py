"""From a plan to the tensors of this rank's packs. Owns tensors and segments, not which samples share a pack.

T rows of a pack, S segments of it (samples, then the tail).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from paralign.models.segments import Segments

from ..batch import IGNORE, PackedBatch, StepBatch, Unit
from .cache import TokenCache
from .packing import PackPlan, plan_packs
from .sampler import assign, packs_of_step, steps_per_epoch

TAIL_ROWS = 128  # longest segment of padding: its attention work stays below that of any real pack

Sample = tuple[np.ndarray, np.ndarray]  # tokens (L,) of any integer type; learned (L,), 1 where predicted


def pack_batch(samples: Sequence[Sample], tokens_per_pack: int, device: torch.device) -> PackedBatch:
    """One pack of the given samples, in the given order, padded with short segments of token 0.

    Row i is to predict token i+1 of its own sample, if that is to be learned. No sample is an empty pack.

    Raises:
        ValueError: the samples are longer than the pack.
    """
    lengths = [len(tokens) for tokens, _ in samples]
    n_real = sum(lengths)
    if n_real > tokens_per_pack:
        raise ValueError(f"samples of {n_real} tokens do not fit a pack of {tokens_per_pack}")
    tokens_T = np.zeros(tokens_per_pack, dtype=np.int64)
    learned_T = np.zeros(tokens_per_pack, dtype=bool)
    if samples:
        np.concatenate([tokens for tokens, _ in samples], out=tokens_T[:n_real], casting="unsafe")
        np.concatenate([learned for _, learned in samples], out=learned_T[:n_real], casting="unsafe")

    n_tail = tokens_per_pack - n_real
    tail = [TAIL_ROWS] * (n_tail // TAIL_ROWS) + ([n_tail % TAIL_ROWS] if n_tail % TAIL_ROWS else [])
    rows_S = np.array(lengths + tail)
    cu_seqlens = np.concatenate(([0], np.cumsum(rows_S)))
    starts = cu_seqlens[:-1]
    learned_T[starts] = False  # the first token of a segment has nothing before it

    labels_T = np.full(tokens_per_pack, IGNORE, dtype=np.int64)
    loss_rows = np.flatnonzero(learned_T) - 1
    labels_T[loss_rows] = tokens_T[loss_rows + 1]

    def send(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    cu_seqlens_S = send(cu_seqlens.astype(np.int32))
    longest = int(rows_S.max())
    segments = Segments(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens_S,
        cu_seqlens_kv=cu_seqlens_S,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions_T=send(np.arange(tokens_per_pack) - np.repeat(starts, rows_S)),
        n_real=n_real,
        bounds=tuple((a, b, a, b) for a, b in pairwise(cu_seqlens.tolist())),
    )
    return PackedBatch(send(tokens_T), send(labels_T), send(loss_rows), segments)


class PackLoader:
    """The steps of one data-parallel rank, over any number of epochs.

    A step is a pure function of its number: resuming is asking for it.

    Args:
        global_batch_size: packs in a step, over all ranks.
        seed: of the order of samples; the same on all ranks.
        micro_batch_multiple: of micro-batches, as the pipeline schedule needs it.
    """

    def __init__(
        self,
        cache: TokenCache,
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
        self._plan = lru_cache(maxsize=1)(self._plan_epoch)
        # Best-fit decreasing makes as many packs whatever the seed, so all epochs have as many steps.
        self.steps_per_epoch = steps_per_epoch(len(self._plan(0)), global_batch_size)

    @property
    def fingerprint(self) -> str:
        """Names the sequence of steps: equal fingerprints give equal samples to equal step numbers."""
        return f"{self.cache.fingerprint}/{self._global_batch_size}/{self._seed}"

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number within it."""
        return divmod(step, self.steps_per_epoch)

    def step(self, step: int) -> StepBatch:
        """Step number `step`, from 0, over all epochs; tensors of this rank, counts of all."""
        epoch, index = self.locate(step)
        plan = self._plan(epoch)
        lengths, n_loss = self.cache.lengths, self.cache.n_loss
        packs = [plan.pack(i) for i in packs_of_step(len(plan), self._global_batch_size, index)]
        work = [int(np.square(lengths[ids]).sum()) for ids in packs]
        mine = assign(work, self._dp_size, self._micro_batch_multiple)[self._dp_rank]
        ids = np.concatenate(packs)
        return StepBatch(
            micro_batches=[self._batch(packs[i] if i is not None else ids[:0]) for i in mine],
            counts={Unit.TOKEN: int(n_loss[ids].sum()), Unit.SAMPLE: len(ids)},
            n_samples=len(ids),
            n_tokens=int(lengths[ids].sum()),
            sample_ids=tuple(ids.tolist()),
        )

    def evaluation(self) -> Iterator[StepBatch]:
        """Every sample once, in the order of the first epoch: the same each time."""
        return map(self.step, range(self.steps_per_epoch))

    def _plan_epoch(self, epoch: int) -> PackPlan:
        return plan_packs(self.cache.lengths, self._tokens_per_pack, seed=self._seed, epoch=epoch)

    def _batch(self, ids: np.ndarray) -> PackedBatch:
        samples = [self.cache.sample(id_) for id_ in ids.tolist()]
        return pack_batch(samples, self._tokens_per_pack, self._device)
