"""Log-probability, entropy and top-k divergence under a vocabulary-parallel head.

The chunked matmul, the collectives and the backward pass; what is done to a chunk of logits stands in vocab.py.

Shape suffixes: R rows with a label, V rows of the head's weight on this rank, H hidden size, K chosen logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paralign.models.head_read import TopK
from paralign.models.weight_gradient import accumulate

from .library import require, require_served
from .vocab import COLUMNS, LOWEST, vocab_gradient_, vocab_partials

# Logits of one chunk, in bytes. Below it the logits of all rows are kept for the backward pass (three matmuls);
# above it they are computed again, chunk by chunk (four), unless the gradient of the rows is known (three).
WORKSPACE_BYTES = 256 * 2**20


class TokenStatistics(NamedTuple):
    """For each row, float32 (R,) (float64 for float64 input).

    Attributes:
        logprob_R: log-probability of the label.
        entropy_R: −Σ p log p over the vocabulary, nats.
        divergence_R: Σ p̂ (log p̂ − log q̂) ≥ 0, nats: p̂ this model, q̂ the reference, each renormalised over the
            reference's K tokens (arXiv 2410.14940, the full KL formula over the top 500 logits); None without one.
        is_likeliest_R: 1 where no logit is greater than the label's, else 0.
    """

    logprob_R: Tensor
    entropy_R: Tensor
    divergence_R: Tensor | None
    is_likeliest_R: Tensor


def token_statistics_ref(
    hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor, reference: TopK | None = None
) -> TokenStatistics:
    """The definition, for one rank and an unpadded vocabulary."""
    logits_RV = hidden_RH @ weight_VH.t()
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    logprobs_RV = logits_RV.log_softmax(-1)
    divergence_R = None
    if reference is not None:
        ours_RK = logits_RV.gather(1, reference.indices_RK).log_softmax(-1)
        theirs_RK = reference.logprobs_RK.log_softmax(-1)
        divergence_R = (ours_RK.exp() * (ours_RK - theirs_RK)).sum(-1)
    logprob_R = logprobs_RV.gather(1, labels_R[:, None])[:, 0]
    entropy_R = -(logprobs_RV.exp() * logprobs_RV).sum(-1)
    is_likeliest_R = (logprob_R == logprobs_RV.amax(-1)).to(logprob_R.dtype)
    return TokenStatistics(logprob_R, entropy_R, divergence_R, is_likeliest_R)


def token_statistics(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_R: Tensor,
    *,
    vocab_size: int,
    reference: TopK | None = None,
    row_gradient: Tensor | None = None,
    group: Any = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> TokenStatistics:
    """What a loss asks of each row's logits, with the vocabulary divided over a tensor-parallel group.

    Args:
        hidden_RH: (R, H), the same on every rank of the group; R may be 0.
        weight_VH: (V, H), rank r of n holds rows r·V … (r + 1)·V of the padded vocabulary. If it has a `main_grad`
            (Megatron's data parallelism), its gradient is added there and marked as added.
        labels_R: int64 (R,), in the whole vocabulary.
        vocab_size: rows of the vocabulary that are real; those past it count as if their logit were −∞.
        reference: the tokens that the divergence is taken over, and what the reference model says of them.
        row_gradient: float32 (R,), what the backward pass will bring for each row's log-probability, and nothing for
            the rest, where that is known beforehand: −w/Σw for a mean negative log-likelihood with weights w. Logits
            that do not fit the workspace then give their gradients at once, chunk by chunk, and are not computed
            again: three matmuls where it takes four. The weight's is added to its `main_grad` in the forward pass; a
            weight without one, and a forward pass without gradient, make no use of this.
        group: the tensor-parallel group, or None for one rank.
        workspace_bytes: largest block of logits to exist at once.

    Returns:
        Every value but `is_likeliest_R` is differentiable; with `row_gradient` the log-probability alone.
        The gradient for `hidden_RH` is this rank's share: the caller's region function sums it.

    Two collectives in all, of 2R floats and of 5R floats, however many chunks there are; with `row_gradient` two for
    each chunk.

    Raises:
        ValueError: shapes or types do not fit; more than `vocab_size` chosen; or, on the CPU, a label or a chosen
            index outside the vocabulary, or another gradient than `row_gradient`. On CUDA, where looking would stop
            the device, such a row, or its gradient, becomes NaN.
    """
    _check(hidden_RH, weight_VH, labels_R)
    if reference is None:
        n_chunks = len(_row_chunks(hidden_RH, weight_VH, workspace_bytes))
        if row_gradient is not None and n_chunks > 1 and torch.is_grad_enabled() and _in_place(weight_VH):
            known = _KnownRowGradient.apply(
                hidden_RH, weight_VH, labels_R, row_gradient, vocab_size, group, workspace_bytes
            )
            logprob_R, entropy_R, is_likeliest_R = known
            return TokenStatistics(logprob_R, entropy_R, None, is_likeliest_R)
        chosen_RK = labels_R.new_empty(labels_R.shape[0], 0)
        chosen_logprob_RK = chosen_RK.float()
    else:
        chosen_RK, logprobs_RK = reference.indices_RK, reference.logprobs_RK
        fits = (
            chosen_RK.dim() == 2
            and chosen_RK.shape == logprobs_RK.shape
            and chosen_RK.shape[0] == labels_R.shape[0]
            and chosen_RK.dtype == torch.int64
            and 0 < chosen_RK.shape[1] <= vocab_size
        )
        rule = f"int64 indices and log-probabilities (R, K), 0 < K ≤ {vocab_size}, the vocabulary"
        require("token_statistics", rule, fits, labels_R, chosen_RK, logprobs_RK)
        chosen_logprob_RK = logprobs_RK.log_softmax(-1)
    logprob_R, entropy_R, divergence_R, is_likeliest_R = _TokenStatistics.apply(
        hidden_RH, weight_VH, labels_R, chosen_RK, chosen_logprob_RK, vocab_size, group, workspace_bytes
    )
    if row_gradient is not None:  # however many chunks there are, gradients are the same
        entropy_R, divergence_R = entropy_R.detach(), divergence_R.detach()
    return TokenStatistics(logprob_R, entropy_R, None if reference is None else divergence_R, is_likeliest_R)


def _check(hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor) -> None:
    require_served("token_statistics", hidden_RH)
    fits = (
        hidden_RH.dim() == weight_VH.dim() == 2
        and hidden_RH.shape[1] == weight_VH.shape[1]
        and hidden_RH.dtype == weight_VH.dtype
        and labels_R.shape == hidden_RH.shape[:1]
        and labels_R.dtype == torch.int64
    )
    rule = "hidden (R, H), weight (V, H) of its type, int64 labels (R,)"
    require("token_statistics", rule, fits, hidden_RH, weight_VH, labels_R)


def _row_chunks(hidden_RH: Tensor, weight_VH: Tensor, workspace_bytes: int) -> list[slice]:
    """Rows whose logits fit the workspace; the same on every rank, also where one has padding only."""
    n_rows, row_bytes = hidden_RH.shape[0], weight_VH.shape[0] * weight_VH.element_size()
    step = max(1, workspace_bytes // max(1, row_bytes))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)] or [slice(0, 0)]


def _columns(weight_VH: Tensor, vocab_size: int, group: Any) -> tuple[int, int]:
    """Where this rank's shard begins, and how many of its rows are no padding."""
    n_columns = weight_VH.shape[0]
    first = 0 if group is None else group.rank() * n_columns
    return first, min(n_columns, max(0, vocab_size - first))


def _in_place(weight: Tensor) -> bool:
    """Whether data parallelism keeps the weight's gradient in a buffer that may be added to."""
    return hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")


def _no_partials(n_rows: int, like: Tensor) -> Tensor:
    """What a shard without columns knows of its rows."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    partials_R7 = torch.zeros(n_rows, COLUMNS, dtype=wide, device=like.device)
    partials_R7[:, [0, 4]] = LOWEST
    return partials_R7


def _may_look(x: Tensor) -> bool:
    """Whether values can be asked for without stopping the device."""
    return not x.is_cuda


def _outside(indices: Tensor, vocab_size: int, what: str) -> Tensor:
    outside = (indices < 0) | (indices >= vocab_size)
    if _may_look(outside) and outside.any():
        row, value = int(outside.nonzero()[0, 0]), int(indices[outside][0])
        raise ValueError(
            f"token_statistics: {what} {value} in row {row} is outside the vocabulary of {vocab_size}"
        )
    return outside


class _Whole(NamedTuple):
    """What all shards together know of each row, (R,) each; the last two are over the chosen."""

    log_sum: Tensor
    label: Tensor
    top: Tensor
    entropy: Tensor
    chosen_log_sum: Tensor
    divergence: Tensor


def _over_all_shards(partials_R7: Tensor, group: Any) -> _Whole:
    own_tops = partials_R7[:, [0, 4]].t().contiguous()
    tops = own_tops
    if group is not None and group.size() > 1:
        tops = own_tops.clone()
        dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=group)
    # Weights and moments from this shard's maximum to the maximum of all; a shard without columns gives 0.
    drop = own_tops - tops
    scale = drop.exp()
    weights = partials_R7[:, [1, 5]].t()
    moments = partials_R7[:, [2, 6]].t() + weights * drop
    sums = torch.cat((weights * scale, moments * scale, partials_R7[:, 3][None]))
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
    weight, chosen_weight, moment, chosen_moment, label = sums
    log_weight, chosen_log_weight = weight.log(), chosen_weight.log()
    return _Whole(
        tops[0] + log_weight,
        label,
        tops[0],
        log_weight - moment / weight,
        tops[1] + chosen_log_weight,
        chosen_moment / chosen_weight - chosen_log_weight,
    )


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        labels_R: Tensor,
        chosen_RK: Tensor,
        chosen_logprob_RK: Tensor,
        vocab_size: int,
        group: Any,
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, real = _columns(weight_VH, vocab_size, group)
        chunks = _row_chunks(hidden_RH, weight_VH, workspace_bytes)
        partials_R7 = _no_partials(hidden_RH.shape[0], hidden_RH)
        logits: Tensor | None = None
        if real > 0:
            for rows in chunks:
                logits = hidden_RH[rows] @ weight_VH[:real].t()
                partials_R7[rows] = vocab_partials(
                    logits, labels_R[rows], chosen_RK[rows], chosen_logprob_RK[rows], first
                )
        log_sum, label, top, entropy, chosen_log_sum, divergence = _over_all_shards(partials_R7, group)
        nowhere = _outside(labels_R, vocab_size, "the label")
        if chosen_RK.shape[1]:
            nowhere = nowhere | _outside(chosen_RK, vocab_size, "a chosen index").any(-1)
        else:
            chosen_log_sum = divergence = torch.zeros_like(log_sum)
        log_sum = torch.where(nowhere, torch.nan, log_sum)  # of which the gradients are made, too
        logprob = label - log_sum

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            hidden_RH,
            *(weight_VH, labels_R, chosen_RK, chosen_logprob_RK),
            *(log_sum, entropy, chosen_log_sum, divergence),
        )
        ctx.first, ctx.real, ctx.chunks = first, real, chunks
        ctx.kept = logits if len(chunks) == 1 else None
        ctx.weight = weight_VH  # the parameter itself: data parallelism keeps `main_grad` on it
        is_likeliest = (label >= top).to(label.dtype)
        ctx.mark_non_differentiable(is_likeliest)
        return logprob, entropy, divergence, is_likeliest

    @staticmethod
    def backward(ctx: Any, *grads_R: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_RH, weight_VH, labels_R, chosen_RK, chosen_logprob_RK, *values = ctx.saved_tensors
        log_sum, entropy, chosen_log_sum, divergence = values
        d_logprob, d_entropy, d_divergence = (
            torch.zeros_like(log_sum) if g is None else g for g in grads_R[:3]
        )
        rows_R7 = torch.stack(
            (log_sum, d_logprob, d_entropy, entropy, d_divergence, chosen_log_sum, divergence), dim=1
        )
        # The kept logits are written over: a second backward pass computes them again.
        kept, ctx.kept = ctx.kept, None
        weight = ctx.weight
        in_place = _in_place(weight)
        grad_weight = _stand_in(weight) if in_place else torch.zeros_like(weight_VH)
        sums = weight.main_grad if in_place else grad_weight
        grad_hidden = torch.zeros_like(hidden_RH)
        if ctx.real > 0:
            real_weight = weight_VH[: ctx.real]
            for rows in ctx.chunks:
                logits = hidden_RH[rows] @ real_weight.t() if kept is None else kept
                vocab_gradient_(
                    logits,
                    *(labels_R[rows], rows_R7[rows], chosen_RK[rows], chosen_logprob_RK[rows], ctx.first),
                )
                grad_hidden[rows] = logits @ real_weight
                accumulate(hidden_RH[rows], logits, sums[: ctx.real])
        return grad_hidden, grad_weight, *[None] * 6


def _stand_in(weight: Any) -> Tensor:
    """A gradient for a weight whose own went to `main_grad`: data parallelism waits for one and does not read it.

    Unless the embedding shares the weight, and autograd adds the two.
    """
    weight.grad_added_to_main_grad = True
    shared = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if shared else torch.empty_like(weight)


class _KnownRowGradient(torch.autograd.Function):
    """Log-probabilities whose gradients are made in the forward pass; entropies and the rest have none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Any,
        labels_R: Tensor,
        row_gradient_R: Tensor,
        vocab_size: int,
        group: Any,
        workspace_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, real = _columns(weight_VH, vocab_size, group)
        nowhere = _outside(labels_R, vocab_size, "the label")
        real_weight = weight_VH[:real]
        grad_hidden = torch.zeros_like(hidden_RH)
        given: list[tuple[Tensor, ...]] = []
        for rows in _row_chunks(hidden_RH, weight_VH, workspace_bytes):
            hidden, labels = hidden_RH[rows], labels_R[rows]
            chosen = labels.new_empty(labels.shape[0], 0)
            if real > 0:
                logits = hidden @ real_weight.t()
                partials_R7 = vocab_partials(logits, labels, chosen, chosen.float(), first)
            else:
                partials_R7 = _no_partials(hidden.shape[0], hidden)
            log_sum, label, top, entropy, *_ = _over_all_shards(partials_R7, group)
            log_sum = torch.where(nowhere[rows], torch.nan, log_sum)
            given.append((label - log_sum, entropy, (label >= top).to(label.dtype)))
            if real > 0:
                rows_R7 = torch.zeros_like(partials_R7)
                rows_R7[:, 0], rows_R7[:, 1] = log_sum, row_gradient_R[rows]
                vocab_gradient_(logits, labels, rows_R7, chosen, chosen.float(), first)
                grad_hidden[rows] = logits @ real_weight
                accumulate(hidden, logits, weight_VH.main_grad[:real])
        ctx.save_for_backward(grad_hidden, row_gradient_R)
        ctx.weight = weight_VH
        logprob, entropy, is_likeliest = (torch.cat(parts) for parts in zip(*given))
        ctx.mark_non_differentiable(entropy, is_likeliest)
        return logprob, entropy, is_likeliest

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, known_R = ctx.saved_tensors[0], ctx.saved_tensors[1].to(grad_R.dtype)
        agrees = torch.isclose(grad_R, known_R, rtol=1e-5, atol=0.0)
        if _may_look(agrees) and not agrees.all():
            row = int(agrees.logical_not().nonzero()[0])
            raise ValueError(
                f"token_statistics: row_gradient was given as {known_R[row].item()}, and the backward pass brought "
                f"{grad_R[row].item()} for row {row}; give none for a loss that is no such sum"
            )
        grad_hidden = torch.where(agrees[:, None], grad_hidden, torch.nan)
        return grad_hidden, _stand_in(ctx.weight), *[None] * 5
