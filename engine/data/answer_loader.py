"""Steps of prompts with their answers, their reference log-probabilities, and mismatched answers for a baseline.

Owns no scoring: what a reference model gave is handed in by answer id.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..batch import Column, PackedBatch, StepBatch, Unit
from .answer_cache import AnswerCache
from .answers import Group, mismatch, rows_of
from .loader import StepLoader, source_column
from .packing import PackPlan, plan_packs
from .pairs import pack_answers
from .sampler import assign, packs_of_step


class AnswerLoader(StepLoader):
    """Steps of groups of answers; see StepLoader.

    Attributes:
        reference: float64, by answer id, log-probabilities under the reference model; None before they are known.
        mismatched_reference: the same for mismatched answers, in the order of steps, and in each step in the
            order of its answers.
        needs_mismatched: whether steps have mismatched answers.
    """

    def __init__(self, cache: AnswerCache, **options: Any) -> None:
        super().__init__(cache, **options)
        self.answers = cache
        self.reference: np.ndarray | None = None
        self.mismatched_reference: np.ndarray | None = None
        self.needs_mismatched = Column.BASELINE in cache.layout.needs
        self._answers_before = [0]  # the first step, the second, … as far as they were asked for

    def step(self, step: int) -> StepBatch:
        """See StepLoader; with mismatched packs where the objective has a baseline."""
        batch = super().step(step)
        if self.needs_mismatched:
            batch.mismatched = self.mismatched(step)
        return batch

    def answers_before(self, step: int) -> int:
        """Answers in all the steps before this one."""
        while len(self._answers_before) <= step:
            ids = self._ids(len(self._answers_before) - 1)
            self._answers_before.append(self._answers_before[-1] + int(self.answers.n_answers[ids].sum()))
        return self._answers_before[step]

    def mismatched(self, step: int) -> list[PackedBatch]:
        """This rank's packs of the step's prompts, each with the answers of the one before it in the step.

        `ANSWER` counts the answers of all steps.
        """
        groups = mismatch(
            [self.answers.group(i) for i in self._ids(step).tolist()],
            self._tokens_per_pack,
            self.answers.layout,
        )
        groups = _numbered(groups, self.answers_before(step))
        rows = np.array([rows_of(group, self.answers.layout) for group in groups])
        plan = plan_packs(rows, self._tokens_per_pack, seed=self._seed, epoch=step)
        return [
            pack_answers(
                [groups[i] for i in ids],
                self._tokens_per_pack,
                self._device,
                self.answers.layout,
                self.mismatched_reference,
            )
            for ids in self._mine(plan, range(len(plan)), rows)
        ]

    def every_answer(self) -> Iterator[list[PackedBatch]]:
        """This rank's packs of each group once, whatever the weights of its source, a step's worth at a time."""
        lengths = self.answers.lengths
        plan = plan_packs(lengths, self._tokens_per_pack, seed=self._seed, epoch=0)
        for first in range(0, len(plan), self._global_batch_size):
            step = packs_of_step(len(plan), self._global_batch_size, first // self._global_batch_size)
            yield [self._batch(ids) for ids in self._mine(plan, step, lengths)]

    def _ids(self, step: int) -> np.ndarray:
        epoch, index = self.epochs.locate(step)
        plan = self.epochs.plan(epoch)
        return np.concatenate(
            [plan.pack(i) for i in packs_of_step(len(plan), self._global_batch_size, index)]
        )

    def _mine(self, plan: PackPlan, packs: range, lengths: np.ndarray) -> list[np.ndarray]:
        """The samples of each of this rank's packs, among those of the plan that are asked for."""
        members = [plan.pack(i) for i in packs]
        work = [int(np.square(lengths[ids]).sum()) for ids in members]
        shares = assign(work, self._dp_size, self._micro_batch_multiple)[self._dp_rank]
        return [members[i] if i is not None else plan.sample_ids[:0] for i in shares]

    def _counts(self, ids: np.ndarray) -> dict[Unit, int]:
        return self.answers.counts(ids)

    def _batch(self, ids: np.ndarray) -> PackedBatch:
        groups = [self.answers.group(id_) for id_ in ids.tolist()]
        batch = pack_answers(groups, self._tokens_per_pack, self._device, self.answers.layout, self.reference)
        if len(self.cache.origins) > 1:
            sources = np.repeat(self.cache.sources[ids], [len(group.answers) for group in groups])
            batch.columns = {**batch.columns, Column.SOURCE: source_column(batch, sources, self._device)}
        return batch


def _numbered(groups: list[Group], first: int) -> list[Group]:
    """The groups with their answers' ids counted from `first`."""
    numbered = []
    for group in groups:
        answers = tuple(replace(answer, id=first + k) for k, answer in enumerate(group.answers))
        numbered.append(replace(group, answers=answers))
        first += len(answers)
    return numbered
