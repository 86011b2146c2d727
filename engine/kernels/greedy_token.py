"""The likeliest token under a vocabulary-parallel head. Owns the reduction over ranks; it has no gradient.

Shape suffixes: R rows, V rows of the head's weight on this rank, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def greedy_token(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_R: Tensor,
    *,
    vocab_size: int,
    group: Any = None,
    row_gradient: Tensor | None = None,
) -> Tensor:
    """argmax h Wᵀ over the whole vocabulary, the smallest id among equals.

    It takes the arguments of `token_logprob`, so that it can stand in its place in a head; see there.

    Args:
        labels_R, row_gradient: not used.

    Returns:
        float32 (R,), ids: exact, as no vocabulary has 2²⁴ tokens. The same on every rank of the group.
    """
    del labels_R, row_gradient
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    first = rank * weight_VH.shape[0]
    real = min(weight_VH.shape[0], max(0, vocab_size - first))
    best_R = hidden_RH.new_full((hidden_RH.shape[0],), -torch.inf, dtype=torch.float32)
    id_R = torch.zeros_like(best_R)
    if real > 0 and hidden_RH.shape[0] > 0:
        best_R, local_R = (hidden_RH @ weight_VH[:real].t()).float().max(-1)
        id_R = (local_R + first).float()
    if size == 1:
        return id_R
    mine = torch.stack((best_R, id_R))
    all_ranks = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(all_ranks, mine, group=group)
    best_NR, id_NR = torch.stack(all_ranks).unbind(1)
    return id_NR.gather(0, best_NR.argmax(0, keepdim=True))[0]
