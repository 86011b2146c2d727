"""Answers a request to the language-model head from the operations beside this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paralign.models.head_read import HeadRead, Quantity

from .next_token import next_token
from .token_statistics import WORKSPACE_BYTES, token_statistics

_OF_LABELS = {Quantity.LOGPROB, Quantity.IS_LIKELIEST}
_OF_LOGITS = {*_OF_LABELS, Quantity.ENTROPY, Quantity.DIVERGENCE}


def read_head(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    read: HeadRead,
    *,
    vocab_size: int,
    group: Any = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> dict[Quantity, Tensor]:
    """What `read` asks for, (R,) each; see `token_statistics` and `next_token` for the arguments.

    What is said of a row's logits costs one product of hidden states and weight, each token that is chosen one more.

    Raises:
        ValueError: it asks for what this head does not give, or leaves out what that needs.
    """
    given: dict[Quantity, Tensor | None] = {}
    if read.quantities & _OF_LOGITS:
        any_label_R = torch.zeros(hidden_RH.shape[0], dtype=torch.int64, device=hidden_RH.device)
        found = token_statistics(
            hidden_RH,
            weight_VH,
            read.labels_R if read.quantities & _OF_LABELS else any_label_R,
            vocab_size=vocab_size,
            reference=read.reference if Quantity.DIVERGENCE in read.quantities else None,
            row_gradient=read.row_gradient_R,
            group=group,
            workspace_bytes=workspace_bytes,
        )
        given |= {
            Quantity.LOGPROB: found.logprob_R,
            Quantity.ENTROPY: found.entropy_R,
            Quantity.DIVERGENCE: found.divergence_R,
            Quantity.IS_LIKELIEST: found.is_likeliest_R,
        }
    if Quantity.LIKELIEST in read.quantities:
        given[Quantity.LIKELIEST] = next_token(hidden_RH, weight_VH, vocab_size=vocab_size, group=group)
    if Quantity.SAMPLED in read.quantities and read.sampling is not None:
        given[Quantity.SAMPLED] = next_token(
            hidden_RH, weight_VH, vocab_size=vocab_size, sampling=read.sampling, group=group
        )
    answer: dict[Quantity, Tensor] = {}
    for quantity in read.quantities:
        if (values := given.get(quantity)) is None:
            raise ValueError(
                f"a language-model head was asked for the {quantity.value}; it gives no value, a divergence only "
                "with a reference, and a sampled token only with seeds"
            )
        answer[quantity] = values
    return answer
