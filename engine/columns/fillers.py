"""Forward passes that fill columns: a reference model's log-probabilities, a baseline of the step.

reference.py keeps on disk what need not be computed twice. Suffixes: S segments, N answers of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from paralign.models.head_read import HeadOutput, Quantity

from ..batch import Column, PackedBatch, StepBatch
from ..objectives.answers import answer_logprob, metric_rows, segment_sums
from ..training.model import Ask, Model
from .sources import BASELINE, REFERENCE

LOGPROBS: Ask = partial(PackedBatch.read, quantities=frozenset({Quantity.LOGPROB}))
VALUES: Ask = partial(PackedBatch.read, quantities=frozenset({Quantity.VALUE}))


class KeptReference:
    """A reference model in memory beside the policy, asked for each step.

    It fills the packs of ranks of the last stage; the other stages never read them.
    """

    source = REFERENCE

    def __init__(self, reference: Model) -> None:
        self._reference = reference

    def fill(self, batch: StepBatch) -> None:
        """See Filler."""
        for packs in (batch.micro_batches, batch.mismatched):
            for pack, logprob_S in zip(packs, self._reference.read(packs, LOGPROBS, answer_logprob)):
                pack.columns = {**pack.columns, Column.REF_LOGPROB: logprob_S}


class StoredReference:
    """A reference model's log-probabilities as they were computed before the run.

    Args:
        values_N: float64, by answer id of the data set.
        mismatched_N: the same for mismatched answers, in the order of steps, and in each step in the order of its
            answers; None where steps have none.
    """

    source = REFERENCE

    def __init__(self, values_N: Tensor, mismatched_N: Tensor | None) -> None:
        self._values_N, self._mismatched_N = values_N, mismatched_N

    def fill(self, batch: StepBatch) -> None:
        """See Filler."""
        put_reference(batch.micro_batches, self._values_N)
        if self._mismatched_N is not None:
            put_reference(batch.mismatched, self._mismatched_N)


def put_reference(packs: Sequence[PackedBatch], values_N: Tensor) -> None:
    """Sets `REF_LOGPROB` of each pack from float64 (N,) by answer id."""
    for pack in packs:
        id_S = pack.columns[Column.ANSWER]  # −1 in the tail
        logprob_S = torch.where(id_S >= 0, values_N.index_select(0, id_S.clamp(min=0)), 0.0)
        pack.columns = {**pack.columns, Column.REF_LOGPROB: logprob_S}


class Baseline:
    """max(0, mean of log π/π_ref over the step's mismatched answers), by the policy as it is; 0 if there are none."""

    source = BASELINE

    def __init__(self, policy: Model) -> None:
        self._policy = policy

    def fill(self, batch: StepBatch) -> None:
        """See Filler."""
        policy = self._policy
        policy.synchronize()
        sums = torch.zeros(2, dtype=torch.float64, device=policy.mesh.device)
        for pack, logprob_S in zip(batch.mismatched, policy.read(batch.mismatched, LOGPROBS, answer_logprob)):
            answers = pack.columns[Column.ANSWERS]
            ratio_N = (logprob_S - pack.columns[Column.REF_LOGPROB]).index_select(0, answers)
            sums += metric_rows(ratio_N)[0]
        total, count = policy.mesh.sum_over_data_then_share(sums).unbind()
        baseline = (total / count.clamp(min=1.0)).clamp(min=0.0).float()
        for pack in batch.micro_batches:
            pack.columns = {**pack.columns, Column.BASELINE: baseline}


def score_answers(model: Model, steps: Iterable[Sequence[PackedBatch]], n_answers: int) -> np.ndarray:
    """log p(answer | prompt) of every answer, float64 (N,), on every rank.

    Args:
        steps: this rank's packs, as many in each step as on any other rank; `ANSWER` says which place of the
            result a segment belongs to, and each place is named by one segment of one rank.
    """
    return _collect(model, steps, n_answers, LOGPROBS, answer_logprob)


def score_values(model: Model, steps: Iterable[Sequence[PackedBatch]], n_answers: int) -> np.ndarray:
    """What a scalar head gives at the end of every answer, float64 (N,), on every rank; see `score_answers`."""
    return _collect(model, steps, n_answers, VALUES, _last_values)


def _last_values(out: HeadOutput, batch: PackedBatch) -> Tensor:
    return segment_sums(out[Quantity.VALUE].double(), batch)


def _collect(
    model: Model,
    steps: Iterable[Sequence[PackedBatch]],
    n_answers: int,
    ask: Ask,
    keep: Callable[[HeadOutput, PackedBatch], Tensor],
) -> np.ndarray:
    values_N = torch.zeros(n_answers, dtype=torch.float64, device=model.mesh.device)
    for packs in steps:
        for pack, values_S in zip(packs, model.read(packs, ask, keep)):
            answers = pack.columns[Column.ANSWERS]
            ids = pack.columns[Column.ANSWER].index_select(0, answers)
            values_N.index_put_((ids,), values_S.index_select(0, answers))
    return model.mesh.sum_over_data_then_share(values_N).cpu().numpy()
