"""What the objectives over answers share: sums over segments, rows of metrics.

Shape suffixes: R rows with a loss, S segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paralign.models.head_read import HeadOutput, Quantity

from ..batch import Column, PackedBatch


def answer_logprob(out: HeadOutput, batch: PackedBatch) -> Tensor:
    """Float64 (S,): log p(answer | prompt) of each segment, 0 in the tail.

    In float64, because losses are made of small differences of these sums over thousands of tokens.
    """
    logprob_R = out[Quantity.LOGPROB].double()
    if Column.IN_ANSWER in batch.columns:  # prompts have labels too
        logprob_R = torch.where(batch.columns[Column.IN_ANSWER], logprob_R, 0.0)
    return segment_sums(logprob_R, batch)


def answer_length(batch: PackedBatch) -> Tensor:
    """Float64 (S,): learned tokens of each segment's answer, at least 1, so that it can be divided by."""
    ones_R = torch.ones_like(batch.loss_rows, dtype=torch.float64)
    if Column.IN_ANSWER in batch.columns:
        ones_R = batch.columns[Column.IN_ANSWER].double()
    return segment_sums(ones_R, batch).clamp(min=1.0)


def segment_sums(values_R: Tensor, batch: PackedBatch) -> Tensor:
    """(S,): the values of each segment's loss rows added up."""
    n_segments = batch.segments.cu_seqlens_q.shape[0] - 1
    return values_R.new_zeros(n_segments).index_add(0, segments_of_rows(batch), values_R)


def segments_of_rows(batch: PackedBatch) -> Tensor:
    """Int64 (R,): the segment that each loss row lies in."""
    bounds = batch.segments.cu_seqlens_q
    return torch.searchsorted(bounds, batch.loss_rows.to(bounds.dtype), right=True) - 1


def metric_rows(*values: Tensor) -> Tensor:
    """Float64 (M, 2), detached: sum and number of elements of each."""
    totals = [value.detach().double().sum() for value in values]
    counts = [total.new_full((), value.numel()) for total, value in zip(totals, values)]
    return torch.stack([torch.stack(totals), torch.stack(counts)], dim=1)
