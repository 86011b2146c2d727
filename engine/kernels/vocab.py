"""Sums over one shard of a row of logits, and the logits' gradient in their place.

What the sums mean, and how shards are put together, stands in token_statistics.py. Kernel: csrc/vocab.cu.

Shape suffixes: R rows, V columns of this shard, K chosen logits (a reference model's top k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import KernelLibrary, library_for, require, require_served, type_code

LOWEST = torch.finfo(torch.float32).min  # the maximum of nothing: −∞ would make NaN of a difference
COLUMNS = 7  # top, weight, moment, label's logit; top, weight, moment of the chosen


def vocab_partials(
    logits_RV: Tensor, labels_R: Tensor, chosen_RK: Tensor, chosen_logprob_RK: Tensor, first_column: int
) -> Tensor:
    """What one shard knows of each row; float32 (R, 7), float64 for float64 logits.

    With top = max z, weight = Σ e^(z−top) and moment = Σ e^(z−top)(z−top): columns 0–2 over the shard, 3 the
    label's logit, or 0 where another shard has it, 4–6 over those of the chosen that lie in this shard, with the
    reference's log-probability subtracted in the moment; a top of nothing is `LOWEST`.

    Args:
        logits_RV: dense, V > 0.
        labels_R: int64, counted over all shards.
        chosen_RK: int64, counted over all shards, distinct in a row; K may be 0.
        chosen_logprob_RK: float32, the reference's, renormalised over the K.
        first_column: where this shard begins.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check("vocab_partials", logits_RV, labels_R, chosen_RK, chosen_logprob_RK)
    return _partials(logits_RV, labels_R, chosen_RK, chosen_logprob_RK, first_column)


def vocab_gradient_(
    logits_RV: Tensor,
    labels_R: Tensor,
    rows_R7: Tensor,
    chosen_RK: Tensor,
    chosen_logprob_RK: Tensor,
    first_column: int,
) -> None:
    """Overwrite logits with their gradient.

    Args:
        rows_R7: for each row log Σ e^z, the gradients of log-probability and of entropy, the entropy; the gradient
            of the divergence, log Σ e^z over the chosen, the divergence; as `vocab_partials` gives its sums.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check("vocab_gradient_", logits_RV, labels_R, chosen_RK, chosen_logprob_RK)
    fits = rows_R7.shape == (logits_RV.shape[0], COLUMNS) and rows_R7.is_contiguous()
    require("vocab_gradient_", "seven numbers for each row", fits, logits_RV, rows_R7)
    _gradient(logits_RV, labels_R, rows_R7, chosen_RK, chosen_logprob_RK, first_column)


def _check(operation: str, logits: Tensor, labels: Tensor, chosen: Tensor, chosen_logprob: Tensor) -> None:
    require_served(operation, logits)
    fits = (
        logits.dim() == chosen.dim() == 2
        and logits.is_contiguous()
        and logits.shape[1] > 0
        and logits.shape[0] == labels.numel() == chosen.shape[0]
        and chosen.shape == chosen_logprob.shape
        and labels.dtype == chosen.dtype == torch.int64
    )
    rule = "dense logits (R, V), int64 labels (R,), int64 chosen (R, K) and their log-probabilities (R, K)"
    require(operation, rule, fits, logits, labels, chosen, chosen_logprob)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _inside(indices: Tensor, first_column: int, columns: int) -> tuple[Tensor, Tensor]:
    """Indices in this shard, and which of them are; those elsewhere point at some column."""
    local = indices - first_column
    return local.clamp(0, columns - 1), (local >= 0) & (local < columns)


@torch.library.custom_op("paralign::vocab_partials", mutates_args=())
def _partials(
    logits: Tensor, labels: Tensor, chosen: Tensor, chosen_logprob: Tensor, first_column: int
) -> Tensor:
    if library := library_for(logits):
        return launch_partials(library, logits, labels, chosen, chosen_logprob, first_column)
    wide = _wide(logits)
    out = wide.new_zeros(logits.shape[0], COLUMNS)
    top = wide.amax(-1)
    shifted = wide - top[:, None]
    weights = shifted.exp()
    local, inside = _inside(labels, first_column, logits.shape[1])
    out[:, 0], out[:, 1], out[:, 2] = top, weights.sum(-1), torch.einsum("rv,rv->r", weights, shifted)
    out[:, 3] = torch.where(inside, wide.gather(1, local[:, None])[:, 0], 0.0)
    out[:, 4].fill_(LOWEST)
    if chosen.shape[1]:
        local, inside = _inside(chosen, first_column, logits.shape[1])
        picked = torch.where(inside, wide.gather(1, local), LOWEST)
        top = picked.amax(-1)
        shifted = picked - top[:, None]
        weights = torch.where(inside, shifted.exp(), 0.0)
        moments = torch.where(inside, weights * (shifted - chosen_logprob.to(wide.dtype)), 0.0)
        out[:, 4], out[:, 5], out[:, 6] = top, weights.sum(-1), moments.sum(-1)
    return out


@torch.library.custom_op("paralign::vocab_gradient_", mutates_args=("logits",))
def _gradient(
    logits: Tensor, labels: Tensor, rows: Tensor, chosen: Tensor, chosen_logprob: Tensor, first_column: int
) -> None:
    if library := library_for(logits):
        launch_gradient(library, logits, labels, rows, chosen, chosen_logprob, first_column)
        return
    log_sum, d_logprob, d_entropy, entropy, d_divergence, chosen_log_sum, divergence = rows[..., None].unbind(
        1
    )
    log_share = _wide(logits) - log_sum
    # d log p(label) = [label] − p;  d entropy = −p (log p + entropy)
    result = log_share.exp() * -(d_logprob + d_entropy * (log_share + entropy))
    local, inside = _inside(labels, first_column, logits.shape[1])
    result.scatter_add_(1, local[:, None], torch.where(inside[:, None], d_logprob, 0.0))
    if chosen.shape[1]:
        # d Σ p̂ (log p̂ − log q̂) = p̂ (log p̂ − log q̂ − divergence), p̂ over the chosen alone
        local, inside = _inside(chosen, first_column, logits.shape[1])
        log_share = _wide(logits).gather(1, local) - chosen_log_sum
        excess = log_share - chosen_logprob.to(rows.dtype) - divergence
        result.scatter_add_(1, local, torch.where(inside, d_divergence * log_share.exp() * excess, 0.0))
    logits.copy_(result)


@_partials.register_fake
def _(logits: Tensor, labels: Tensor, chosen: Tensor, chosen_logprob: Tensor, first_column: int) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], COLUMNS, dtype=dtype)


@_gradient.register_fake
def _(*arguments: object) -> None:
    del arguments


def launch_partials(
    library: KernelLibrary,
    logits: Tensor,
    labels: Tensor,
    chosen: Tensor,
    chosen_logprob: Tensor,
    first_column: int,
) -> Tensor:
    """The kernel: each row is read once."""
    rows, columns = logits.shape
    out = torch.empty(rows, COLUMNS, dtype=torch.float32, device=logits.device)
    code = type_code("vocab_partials", logits)
    labels, chosen, chosen_logprob = _dense(labels, chosen, chosen_logprob)
    if rows:
        library.call(
            "vocab_partials",
            *(logits, labels, chosen, chosen_logprob, out),
            *(rows, columns, first_column, chosen.shape[1], code),
        )
    return out


def launch_gradient(
    library: KernelLibrary,
    logits: Tensor,
    labels: Tensor,
    row_values: Tensor,
    chosen: Tensor,
    chosen_logprob: Tensor,
    first_column: int,
) -> None:
    """The kernel, in place."""
    rows, columns = logits.shape
    code = type_code("vocab_gradient_", logits)
    labels, chosen, chosen_logprob = _dense(labels, chosen, chosen_logprob)
    if rows:
        library.call(
            "vocab_gradient",
            *(logits, labels, row_values, chosen, chosen_logprob),
            *(rows, columns, first_column, chosen.shape[1], code),
        )


def _dense(labels: Tensor, chosen: Tensor, chosen_logprob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return labels.contiguous(), chosen.contiguous(), chosen_logprob.float().contiguous()
