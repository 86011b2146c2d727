"""What flows through the engine: packs, their columns, and sums of losses.

Shape suffixes: T rows of a pack, S segments of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor

from paralign.models.head_read import HeadRead, Quantity, Sampling, TopK

if TYPE_CHECKING:  # Segments costs the import of megatron-core; recipe checks must start at once
    from paralign.models.segments import Segments

IGNORE = -100  # the label of a row without loss, as in torch and transformers


class Column(Enum):
    """A named tensor beside the tokens of a pack: S segments, P pairs, N answers, R rows with a loss."""

    SOURCE = "source"  # (S,) int64: index of the data set a segment came from, where there are several
    ANSWER = "answer"  # (S,) int64: id of the answer in its data set; −1 in the padding tail
    ANSWERS = "answers"  # (N,) int64: the segments that hold answers, in order
    PAIR = "pair"  # (P, 2) int64: the segments of each pair's chosen and rejected answer
    IN_ANSWER = (
        "in_answer"  # (R,) bool: whether the label of a loss row belongs to the answer, not the prompt
    )
    DESIRABLE = "desirable"  # (S,) bool: the answer's label; false in the tail
    SCORE = "score"  # (S,) float32: absolute score of the answer, normalised; NaN where there is none
    MARGIN = "margin"  # (P,) float32: by how much the chosen answer is better, at least; 0 if not stated
    REF_LOGPROB = "ref_logprob"  # (S,) float64: log p(answer | prompt) under the reference model
    BASELINE = "baseline"  # () float32: one number for the whole step
    REF_TOP_TOKENS = "ref_top_tokens"  # (R, K) int64: the reference model's likeliest tokens
    REF_TOP_LOGPROBS = "ref_top_logprobs"  # (R, K) float32: and their log-probabilities there


class Kind(Enum):
    """What a record of the data is read as."""

    CONVERSATIONS = "conversations"
    PAIRS = "pairs"  # a prompt with a chosen and a rejected answer
    LABELLED = "labelled"  # a prompt with an answer that is good or bad


class Head(Enum):
    """What the model's last layer is."""

    LM = "lm"
    SCALAR = "scalar"


class Unit(Enum):
    """What a loss is averaged over."""

    TOKEN = "token"
    SAMPLE = "sample"
    PAIR = "pair"


@dataclass
class PackedBatch:
    """One pack, which is one micro-batch.

    Attributes:
        tokens_T: int64 (T,).
        labels_T: int64 (T,), already shifted: row i holds the token it is to predict, or `IGNORE`.
        loss_rows: int64 (R,), the rows that the head computes, in order: those of `labels_T` that are not
            `IGNORE`, or under a scalar head those whose value is read; from the loader, so that no kernel asks
            the device how many there are.
        weights_T: float32 (T,), what each row's label counts in a loss over tokens; 0 where a row has none.
        segments: who attends to whom.
        columns: what objectives need besides; their shapes stand in `Column`.
    """

    tokens_T: Tensor
    labels_T: Tensor
    loss_rows: Tensor
    weights_T: Tensor
    segments: Segments
    columns: Mapping[Column, Tensor] = field(default_factory=dict)

    @property
    def weights_R(self) -> Tensor:
        """Float32 (R,), the weight of each loss row."""
        return self.weights_T.index_select(0, self.loss_rows)

    def read(
        self,
        quantities: frozenset[Quantity],
        row_gradient: float | None = None,
        sampling: Sampling | None = None,
    ) -> HeadRead:
        """The request for these quantities of the loss rows.

        Args:
            row_gradient: see `Objective.row_gradient`; each row's is this times its weight.
            sampling: for `SAMPLED`.
        """
        reference = None
        if Quantity.DIVERGENCE in quantities:
            reference = TopK(self.columns[Column.REF_TOP_TOKENS], self.columns[Column.REF_TOP_LOGPROBS])
        return HeadRead(
            quantities,
            self.loss_rows,
            self.labels_T.index_select(0, self.loss_rows),
            None if row_gradient is None else row_gradient * self.weights_R,
            reference,
            sampling,
        )


@dataclass
class StepBatch:
    """What one data-parallel rank computes in one optimizer step, and what the whole step counts.

    Attributes:
        micro_batches: the packs of this rank.
        counts: over the packs of *all* ranks: what a loss in that unit is divided by; of tokens their weights.
        n_samples, n_tokens: real samples and real tokens over all ranks.
        sample_ids: ids of all the samples in the step, over all ranks, in pack order.
        n_loss, squared_lengths: over all ranks, rows whose label is learned and the sum of squared sample lengths:
            what FLOPs are counted from.
        place: where a sample was read, `file:line`, by its id.
        pack_samples: for each of these packs the ids of its samples.
        mismatched: packs of this rank in which prompts are followed by other prompts' answers, where the
            objective needs a baseline from them; on no rank where the step has one prompt only.
    """

    micro_batches: Sequence[PackedBatch]
    counts: Mapping[Unit, float]
    n_samples: int
    n_tokens: int
    sample_ids: tuple[int, ...]
    n_loss: int = 0
    squared_lengths: int = 0
    place: Callable[[int], str] = str
    pack_samples: Sequence[Sequence[int]] = ()
    mismatched: list[PackedBatch] = field(default_factory=list)


@dataclass
class LossSum:
    """Sums, never means.

    Attributes:
        totals: for each unit the summed loss, fp32 scalar with gradient; divided once, by the global count.
        metrics: float64 (len(objective.metrics), 2), a sum and a count for each declared metric, detached.
    """

    totals: Mapping[Unit, Tensor]
    metrics: Tensor
