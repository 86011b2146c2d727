"""The next token under a vocabulary-parallel head: the likeliest, or one drawn. Has no gradient.

Shape suffixes: R rows, V rows of the head's weight on this rank, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paralign.models.head_read import Sampling

from .library import require

ROW_BYTES = 2**28  # of scores that exist at once, in float64


def next_token(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    *,
    vocab_size: int,
    sampling: Sampling | None = None,
    group: Any = None,
) -> Tensor:
    """argmax over the whole vocabulary of h Wᵀ, or of h Wᵀ / temperature + Gumbel noise; int64 (R,).

    With the noise it is a draw from the softmax (Gumbel-max). The noise is a function of a row's seed and a token's
    id alone, so that a seed draws the same token at every layout and in every pack, but for rounding of the logits.

    Args:
        hidden_RH: the same on every rank of the group; R may be 0.
        weight_VH: rank r of n holds rows r·V … (r + 1)·V of the padded vocabulary.
        vocab_size: rows of the vocabulary that are real.
        sampling: how tokens are drawn; None takes the likeliest, the smallest id among equals.
        group: the tensor-parallel group, or None for one rank.

    Returns:
        Token ids, the same on every rank of the group.

    Raises:
        ValueError: there is not one seed for each row.
    """
    if sampling is not None:
        one_each = sampling.seeds_R.shape == hidden_RH.shape[:1] and sampling.seeds_R.dtype == torch.int64
        require("next_token", "int64 seeds (R,), one for each row", one_each, sampling.seeds_R, hidden_RH)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    first = rank * weight_VH.shape[0]
    real = min(weight_VH.shape[0], max(0, vocab_size - first))
    best_R = hidden_RH.new_full((hidden_RH.shape[0],), -torch.inf, dtype=torch.float64)
    id_R = torch.zeros_like(best_R)  # exact in float64: ids travel with their scores
    step = max(1, ROW_BYTES // (8 * max(1, real)))
    for start in range(0, hidden_RH.shape[0] if real else 0, step):
        rows = slice(start, start + step)
        scores_RV = (hidden_RH[rows] @ weight_VH[:real].t()).double()
        if sampling is not None:
            ids_V = torch.arange(first, first + real, device=hidden_RH.device)
            scores_RV = scores_RV / sampling.temperature + gumbel(sampling.seeds_R[rows], ids_V)
        best_R[rows], local_R = scores_RV.max(-1)
        id_R[rows] = (local_R + first).double()
    if size > 1:
        mine = torch.stack((best_R, id_R))
        every = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(every, mine, group=group)
        best_NR, id_NR = torch.stack(every).unbind(1)
        id_R = id_NR.gather(0, best_NR.argmax(0, keepdim=True))[0]
    return id_R.long()


def gumbel(seeds_R: Tensor, ids_V: Tensor) -> Tensor:
    """Standard Gumbel noise, float64 (R, V), a function of each seed and id: −log(−log u), u in (0, 1)."""
    bits_RV = _mixed(_mixed(seeds_R)[:, None] + _GOLDEN * ids_V)
    uniform_RV = (_shifted(bits_RV, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform_RV))


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) over int64, whose products wrap: every bit depends on all."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """A logical shift to the right: torch's copies the sign."""
    return (x >> n) & (2 ** (64 - n) - 1)
