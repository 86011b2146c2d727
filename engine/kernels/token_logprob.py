"""Log-probability of a label under a vocabulary-parallel head. Owns the chunked matmul and its own backward.

Shape suffixes: R rows with a label, V rows of the head's weight on this rank, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits of one chunk, in bytes of float32. Below it the logits of all rows are kept for the backward pass
# (three matmuls); above it they are computed again, chunk by chunk (four).
WORKSPACE_BYTES = 256 * 2**20


def token_logprob_ref(hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor) -> Tensor:
    """The definition, for one rank and an unpadded vocabulary: log softmax(h Wᵀ) at the label; float32 (R,)."""
    logits_RV = (hidden_RH @ weight_VH.t()).float()
    return logits_RV.log_softmax(-1).gather(1, labels_R[:, None])[:, 0]


def token_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_R: Tensor,
    *,
    vocab_size: int,
    group: Any = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """Log-probability of each row's label, with the vocabulary divided over a tensor-parallel group.

    Args:
        hidden_RH: (R, H), the same on every rank of the group; R may be 0.
        weight_VH: (V, H), rank r of n holds rows r·V … (r + 1)·V of the padded vocabulary.
        labels_R: int64 (R,), in the whole vocabulary.
        vocab_size: rows of the vocabulary that are real; those past it count as if their logit were −∞.
        group: the tensor-parallel group, or None for one rank.
        workspace_bytes: largest block of float32 logits to exist at once.

    Returns:
        float32 (R,). Its gradient for `hidden_RH` is this rank's share: the caller's region function sums it.

    Two collectives in all, of R floats and of 2R floats, however many chunks there are.
    """
    return _TokenLogprob.apply(hidden_RH, weight_VH, labels_R, vocab_size, group, workspace_bytes)


def _chunks(n_rows: int, n_columns: int, workspace_bytes: int) -> list[slice]:
    step = max(1, workspace_bytes // (4 * max(1, n_columns)))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        labels_R: Tensor,
        vocab_size: int,
        group: Any,
        workspace_bytes: int,
    ) -> Tensor:
        n_rows, n_columns = hidden_RH.shape[0], weight_VH.shape[0]
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        first = rank * n_columns
        real = min(n_columns, max(0, vocab_size - first))
        local_R = labels_R - first
        is_local_R = (local_R >= 0) & (local_R < real)
        local_R = local_R.clamp(0, n_columns - 1)
        real_weight = weight_VH[:real]

        chunks = _chunks(n_rows, n_columns, workspace_bytes)
        keep = len(chunks) == 1
        kept: Tensor | None = None
        top_R = hidden_RH.new_full((n_rows,), -torch.inf, dtype=torch.float32)
        label_R = torch.zeros_like(top_R)
        sum_R = torch.zeros_like(top_R)
        if real > 0:
            for rows in chunks:
                logits = (hidden_RH[rows] @ real_weight.t()).float()
                top = logits.amax(-1)
                label = logits.gather(1, local_R[rows].clamp(max=real - 1)[:, None])[:, 0]
                exponent = logits.sub_(top[:, None]).exp_()
                top_R[rows], label_R[rows], sum_R[rows] = top, label, exponent.sum(-1)
                if keep:
                    kept = exponent
        local_top_R = top_R
        if size > 1:
            top_R = local_top_R.clone()
            dist.all_reduce(top_R, op=dist.ReduceOp.MAX, group=group)
        rescale_R = torch.exp(local_top_R - top_R)  # 0 where this rank has no real column
        stats = torch.stack((sum_R * rescale_R, torch.where(is_local_R, label_R, 0.0)))
        if size > 1:
            dist.all_reduce(stats, group=group)
        log_sum_R = stats[0].log() + top_R
        ctx.save_for_backward(
            hidden_RH, weight_VH, local_R, is_local_R, log_sum_R, kept, rescale_R / stats[0]
        )
        ctx.real, ctx.chunks = real, chunks
        return stats[1] - log_sum_R

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_RH, weight_VH, local_R, is_local_R, log_sum_R, kept, to_probability_R = ctx.saved_tensors
        dtype = hidden_RH.dtype
        real_weight = weight_VH[: ctx.real]
        grad_hidden = torch.zeros_like(hidden_RH)
        grad_weight = torch.zeros_like(weight_VH)
        if ctx.real == 0:
            return grad_hidden, grad_weight, None, None, None, None
        grad_real = grad_weight[: ctx.real]
        hit_R = torch.where(is_local_R, grad_R, 0.0)
        for rows in ctx.chunks:
            # d log p / d logit = onehot(label) − softmax
            if kept is not None:
                grad_logits = kept * (-grad_R * to_probability_R)[rows, None]
            else:
                logits = (hidden_RH[rows] @ real_weight.t()).float()
                grad_logits = logits.sub_(log_sum_R[rows, None]).exp_().mul_(-grad_R[rows, None])
            grad_logits.scatter_add_(1, local_R[rows].clamp(max=ctx.real - 1)[:, None], hit_R[rows, None])
            grad_logits = grad_logits.to(dtype)
            grad_hidden[rows] = grad_logits @ real_weight
            if len(ctx.chunks) == 1:
                torch.mm(grad_logits.t(), hidden_RH, out=grad_real)
            else:
                grad_real.addmm_(grad_logits.t(), hidden_RH[rows])
        return grad_hidden, grad_weight, None, None, None, None
