"""Forward passes that fill columns: a reference model's log-probabilities, a baseline of the step.

Owns what is computed before a step, by any model, and how it goes back to its packs; reference.py owns what is
kept on disk. Suffixes: S segments, N answers of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batch import Column, PackedBatch, StepBatch
from .model import Model
from .objectives.answers import answer_logprob


@dataclass(frozen=True)
class Preparation:
    """What is computed for each step before its schedule runs.

    Attributes:
        model: the policy.
        needs: columns of the objective.
        reference: a reference model that is kept, None where its log-probabilities are read from disk.
    """

    model: Model
    needs: Set[Column]
    reference: Model | None

    def __call__(self, batch: StepBatch) -> None:
        """Fills the columns of a step's packs that no loader can."""
        if self.reference is not None:
            fill_reference(self.reference, batch.micro_batches)
        if Column.BASELINE in self.needs:
            if self.reference is not None:
                fill_reference(self.reference, batch.mismatched)
            self.model.synchronize()
            fill_baseline(self.model, batch.micro_batches, batch.mismatched)


def fill_reference(reference: Model, packs: Sequence[PackedBatch]) -> None:
    """Sets `REF_LOGPROB` of each pack by the reference model, on ranks of the last stage.

    Other stages never read it.
    """
    for pack, logprob_S in zip(packs, reference.read(packs, answer_logprob)):
        pack.columns = {**pack.columns, Column.REF_LOGPROB: logprob_S}


def score_answers(model: Model, steps: Iterable[Sequence[PackedBatch]], n_answers: int) -> np.ndarray:
    """log p(answer | prompt) of every answer, float64 (N,), on every rank.

    Args:
        steps: this rank's packs, as many in each step as on any other rank; `ANSWER` says which place of the
            result a segment belongs to, and each place is named by one segment of one rank.
    """
    return _collect(model, steps, n_answers, answer_logprob)


def score_values(model: Model, steps: Iterable[Sequence[PackedBatch]], n_answers: int) -> np.ndarray:
    """What a scalar head gives at the end of every answer, float64 (N,), on every rank; see `score_answers`."""
    return _collect(model, steps, n_answers, _last_values)


def fill_baseline(policy: Model, packs: Sequence[PackedBatch], mismatched: Sequence[PackedBatch]) -> None:
    """Sets `BASELINE` of each pack: max(0, mean of log π/π_ref over the step's mismatched answers).

    Args:
        mismatched: this rank's share of them, `REF_LOGPROB` filled in.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=policy.mesh.device)
    for pack, logprob_S in zip(mismatched, policy.read(mismatched, answer_logprob)):
        answers = pack.columns[Column.ANSWERS]
        ratio_N = (logprob_S - pack.columns[Column.REF_LOGPROB]).index_select(0, answers)
        sums += torch.stack((ratio_N.sum(), ratio_N.new_tensor(ratio_N.numel())))
    total, count = policy.mesh.sum_over_data_then_share(sums).unbind()
    baseline = (total / count.clamp(min=1.0)).clamp(min=0.0).float()
    for pack in packs:
        pack.columns = {**pack.columns, Column.BASELINE: baseline}


def _last_values(out_T: Tensor, batch: PackedBatch) -> Tensor:
    return out_T.index_select(0, batch.segments.cu_seqlens_q[1:].long() - 1).double()


def _collect(
    model: Model,
    steps: Iterable[Sequence[PackedBatch]],
    n_answers: int,
    keep: Callable[[Tensor, PackedBatch], Tensor],
) -> np.ndarray:
    values_N = torch.zeros(n_answers, dtype=torch.float64, device=model.mesh.device)
    for packs in steps:
        for pack, values_S in zip(packs, model.read(packs, keep)):
            answers = pack.columns[Column.ANSWERS]
            ids = pack.columns[Column.ANSWER].index_select(0, answers)
            values_N.index_put_((ids,), values_S.index_select(0, answers))
    return model.mesh.sum_over_data_then_share(values_N).cpu().numpy()
