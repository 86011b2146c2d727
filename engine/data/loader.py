"""From a plan to this rank's packs of a step. packing.py decides what shares a pack, pack.py builds tensors.

S segments of a pack.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..batch import Column, PackedBatch, StepBatch
from .answers import Group, mismatch, rows_of
from .cache import TokenCache
from .epochs import Epochs, Share, packs_of_step, with_packing
from .pack import pack_groups, send
from .packing import MIXED, PackPlan, plan_packs

NO_SOURCE = -1  # in Column.SOURCE: a segment of padding


class PackLoader:
    """The steps of one data-parallel rank, over any number of epochs.

    A step is a pure function of its number: resuming is asking for it.

    Attributes:
        epochs: which packs each epoch holds.
        needs_mismatched: whether steps have mismatched answers.

    Args:
        global_batch_size: packs in a step, over all ranks.
        seed: of the order of samples; the same on all ranks.
        share: of each step that is this rank's.
        packing: version of the plans, see `plan_packs`.
    """

    def __init__(
        self,
        cache: TokenCache,
        *,
        global_batch_size: int,
        seed: int,
        share: Share,
        device: torch.device,
        packing: int = MIXED,
    ) -> None:
        self.cache = cache
        self.needs_mismatched = Column.BASELINE in cache.layout.needs
        self._tokens_per_pack = cache.config.tokens_per_pack
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._share = share
        self._device = device
        self._packing = packing
        self._planning = threading.RLock()  # a step may be made on one thread while another counts
        self._before = [(0, 0)]  # each step, as far as they were asked for: answers and their tokens
        self.epochs = Epochs(cache, global_batch_size=global_batch_size, seed=seed, packing=packing)

    @property
    def fingerprint(self) -> str:
        """Names the sequence of steps: equal fingerprints give equal samples to equal step numbers."""
        steps = f"{self.cache.fingerprint}/{self._global_batch_size}/{self._seed}"
        return with_packing(steps, self._packing)

    def begin_thread(self) -> None:
        """What another thread than the main one does before it asks for steps: a new thread is on the first GPU."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def step(self, step: int) -> StepBatch:
        """Step number `step`, from 0, over all epochs; tensors of this rank, counts of all."""
        packs = self._packs_of(step)
        all_ids = np.concatenate(packs)
        mine = self._share.of(packs, self.cache.lengths)
        return StepBatch(
            micro_batches=[self._pack(ids) for ids in mine],
            counts=self.cache.counts(all_ids),
            n_samples=len(all_ids),
            n_tokens=int(self.cache.lengths[all_ids].sum()),
            sample_ids=tuple(all_ids.tolist()),
            n_loss=int(self.cache.n_loss[all_ids].sum()),
            squared_lengths=int(np.square(self.cache.lengths[all_ids]).sum()),
            place=self.cache.place,
            pack_samples=[ids.tolist() for ids in mine],
            mismatched=self.mismatched(step) if self.needs_mismatched else [],
        )

    def pack_of(self, ids: Sequence[int]) -> PackedBatch:
        """A pack of the given samples alone."""
        return self._pack(np.array(ids, dtype=np.int64))

    def evaluation(self) -> Iterator[StepBatch]:
        """Every sample once, in the order of the first epoch: the same each time."""
        return map(self.step, range(self.epochs.first_step(1)))

    def every_answer(self) -> Iterator[list[PackedBatch]]:
        """This rank's packs of each sample once, whatever the weight of its source, a step's worth at a time."""
        plan = self._plan(self.cache.lengths, epoch=0)
        for mine in self._share.of_plan(plan, self.cache.lengths, self._global_batch_size):
            yield [self._pack(ids) for ids in mine]

    def answers_before(self, step: int) -> int:
        """Answers in all the steps before this one."""
        return self._counted(step)[0]

    def tokens_before(self, step: int) -> int:
        """Tokens of all answers in the steps before this one, each with its prompt."""
        return self._counted(step)[1]

    def _counted(self, step: int) -> tuple[int, int]:
        with self._planning:
            while len(self._before) <= step:
                ids = np.concatenate(self._packs_of(len(self._before) - 1))
                answers, tokens = self._before[-1]
                self._before.append(
                    (
                        answers + int(self.cache.n_answers[ids].sum()),
                        tokens + int(self.cache.n_tokens[ids].sum()),
                    )
                )
            return self._before[step]

    def mismatched(self, step: int) -> list[PackedBatch]:
        """This rank's packs of the step's prompts, each with the answers of another; see `answers.mismatch`.

        `ANSWER` counts the answers of all steps. No pack on any rank where the step has one prompt only.
        """
        layout = self.cache.layout
        ids = np.concatenate(self._packs_of(step))
        groups = mismatch([self.cache.group(i) for i in ids.tolist()], self._tokens_per_pack, layout)
        if not groups:
            return []
        groups = _numbered(groups, self.answers_before(step))
        rows = np.array([rows_of(group, layout) for group in groups])
        plan = self._plan(rows, epoch=step)
        (mine,) = self._share.of_plan(plan, rows, len(plan))
        return [self._pack_groups([groups[i] for i in numbers]) for numbers in mine]

    def _plan(self, rows: np.ndarray, *, epoch: int) -> PackPlan:
        return plan_packs(rows, self._tokens_per_pack, seed=self._seed, epoch=epoch, version=self._packing)

    def _packs_of(self, step: int) -> list[np.ndarray]:
        """The samples of each pack of a step, over all ranks."""
        with self._planning:
            epoch, index = self.epochs.locate(step)
            plan = self.epochs.plan(epoch)
        return [plan.pack(i) for i in packs_of_step(len(plan), self._global_batch_size, index)]

    def _pack(self, ids: np.ndarray) -> PackedBatch:
        groups = [self.cache.group(id_) for id_ in ids.tolist()]
        pack = self._pack_groups(groups)
        if len(self.cache.origins) > 1:
            sources_S = np.full(len(pack.segments.bounds), NO_SOURCE)
            of_answers = np.repeat(self.cache.sources[ids], [len(group.answers) for group in groups])
            sources_S[: len(of_answers)] = of_answers
            pack.columns = {**pack.columns, Column.SOURCE: send(sources_S, self._device)}
        return pack

    def _pack_groups(self, groups: Sequence[Group]) -> PackedBatch:
        return pack_groups(groups, self._tokens_per_pack, self._device, self.cache.layout)


def _numbered(groups: list[Group], first: int) -> list[Group]:
    """The groups with their answers' ids counted from `first`."""
    numbered = []
    for group in groups:
        answers = tuple(replace(answer, id=first + k) for k, answer in enumerate(group.answers))
        numbered.append(replace(group, answers=answers))
        first += len(answers)
    return numbered
