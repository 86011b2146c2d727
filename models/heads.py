"""A model's last layer: log-probabilities and their like, or values. Its operation on the vocabulary is handed in.

Shape suffixes: T rows of a pack, B = 1 (a micro-batch is one pack), H hidden size, R rows that are asked for,
V rows of the head's weight on this rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .head_read import HeadOutput, HeadRead, Quantity
from .mcore import ColumnParallelLinear, make_sharded_tensors_for_checkpoint, tensor_parallel


class ReadHead(Protocol):
    """What a request asks for, of rows whose vocabulary is divided over `group`; see engine/kernels/head.py."""

    def __call__(
        self, hidden_RH: Tensor, weight_VH: Tensor, read: HeadRead, *, vocab_size: int, group: Any
    ) -> dict[Quantity, Tensor]: ...


class VocabularyHead(ColumnParallelLinear):
    """The language-model head: what is asked of chosen rows, never the logits of a whole pack.

    It is a called module that owns its weight, so that DDP's hooks fire in order; a pack without labels still
    runs it on zero rows, or an overlapped gradient reduction would wait for ever.
    """

    def __init__(
        self, *args: Any, vocab_size: int, normalised: bool, read_head: ReadHead, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.vocab_size = vocab_size
        self.normalised = normalised
        self.read_head = read_head

    def forward(  # type: ignore[override]
        self, hidden_TBH: Tensor, read: HeadRead, weight: Tensor | None = None
    ) -> HeadOutput:
        """(R,) for each quantity of the request; `weight` (V, H) stands in for the head's own where it is tied."""
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_TBH, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_TBH, group=self.tp_group)
        weight_VH = self.weight if weight is None else weight
        if self.normalised:  # each row lies on one rank; padding rows have gradient zero, so 0 / ε stays 0
            weight_VH = F.normalize(weight_VH, dim=-1)
        return self.read_head(
            hidden[:, 0].index_select(0, read.rows_R),
            weight_VH,
            read,
            vocab_size=self.vocab_size,
            group=self.tp_group,
        )


class ScalarHead(torch.nn.Module):
    """w·h for chosen rows, under Hugging Face's name `score.weight`.

    Every tensor-parallel rank holds the whole weight and computes the same values from the same rows, so its
    gradient is whole on each and nothing is summed. A pack without such rows still runs it on none: the weight must
    receive a gradient in every pack, or an overlapped reduction would wait for ever.
    """

    def __init__(self, config: Any, hidden_size: int, *, tp_group: Any) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=config.params_dtype))

    def forward(self, hidden_TBH: Tensor, read: HeadRead) -> HeadOutput:
        """The values, float32 (R,). Raises ValueError where something else is asked for."""
        for quantity in read.quantities - {Quantity.VALUE}:
            raise ValueError(f"a scalar head was asked for the {quantity.value}; it gives the value alone")
        if self.sequence_parallel:
            # Each rank's gradient of the gathered rows is the whole one: it is divided again, not summed.
            hidden_TBH = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_TBH, tensor_parallel_output_grad=False, group=self.tp_group
            )
        hidden_RH = hidden_TBH[:, 0].index_select(0, read.rows_R)
        return {Quantity.VALUE: (hidden_RH @ self.weight.t())[:, 0].float()}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight, whole on every rank, as Megatron's checkpoints describe it."""
        del metadata
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {}, sharded_offsets
        )
