"""What is asked of a model's head, and under which names it answers.

Shape suffixes: R rows that the head computes, K chosen logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class Quantity(Enum):
    """Something that a head gives of each row, (R,).

    All but the sampled and the likeliest token are float32; gradients flow through the first three and the value.
    """

    LOGPROB = "log-probability of the label"
    ENTROPY = "−Σ p log p over the vocabulary, nats"
    DIVERGENCE = "divergence from a reference over its top k, nats"
    IS_LIKELIEST = "1 where no token is likelier than the label, else 0"
    LIKELIEST = "likeliest token, int64: the smallest id among equals"
    SAMPLED = "token drawn from the distribution, int64"
    VALUE = "value of a scalar head"


HeadOutput = Mapping[Quantity, Tensor]


@dataclass(frozen=True)
class TopK:
    """A reference model's largest logits for each row.

    Attributes:
        indices_RK: int64, in the whole vocabulary, distinct in a row.
        logprobs_RK: float32, the reference's log-probabilities there; renormalised over the K by who reads them.
    """

    indices_RK: Tensor
    logprobs_RK: Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the same seeds draw the same tokens at every layout.

    Attributes:
        seeds_R: int64, one for each row; equal seeds draw alike.
        temperature: the logits are divided by it. Raises ValueError unless it is above 0 and finite.
    """

    seeds_R: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature:g}; expected a number above 0")


@dataclass(frozen=True)
class HeadRead:
    """A request: which rows of a pack, and what of each.

    Attributes:
        quantities: what is asked for; a language model's head has no value, a scalar head nothing else.
        rows_R: int64, rows of the pack, ascending.
        labels_R: int64, the token that each is to predict; not read where none of the quantities is about it.
        row_gradient_R: float32, the gradient that the log-probability of each row will get, if it is known before
            the loss: it spares the head a product. Gradients flow through nothing else then.
        reference: what DIVERGENCE is taken from.
        sampling: how SAMPLED is drawn.
    """

    quantities: frozenset[Quantity]
    rows_R: Tensor
    labels_R: Tensor
    row_gradient_R: Tensor | None = None
    reference: TopK | None = None
    sampling: Sampling | None = None
