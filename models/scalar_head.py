"""The scalar head: one value for each row that is asked for. Owns its weight, whole on every rank.

Shape suffixes: T rows of a pack, H hidden size, R rows whose value is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mcore import make_sharded_tensors_for_checkpoint, tensor_parallel


class ScalarHead(torch.nn.Module):
    """w·h for chosen rows, under Hugging Face's name `score.weight`.

    Every tensor-parallel rank computes the same values from the same rows, so its weight's gradient is whole
    on each and nothing is summed. A pack without such rows still runs it on none: the weight must receive a
    gradient in every pack, or an overlapped reduction would wait for ever.
    """

    def __init__(self, config: Any, hidden_size: int, *, tp_group: Any) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=config.params_dtype))

    def forward(self, hidden_TBH: Tensor, rows_R: Tensor, n_rows: int) -> Tensor:
        """Float32 (T,): the value where one is asked for, 0 elsewhere; `n_rows` is T."""
        if self.sequence_parallel:
            # Each rank's gradient of the gathered rows is the whole one: it is divided again, not summed.
            hidden_TBH = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_TBH, tensor_parallel_output_grad=False, group=self.tp_group
            )
        values_R = (hidden_TBH[:, 0].index_select(0, rows_R) @ self.weight.t())[:, 0].float()
        zeros = torch.zeros(n_rows, dtype=torch.float32, device=rows_R.device)
        return zeros.index_put((rows_R,), values_R)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight, whole on every rank, as Megatron's checkpoints describe it."""
        del metadata
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {}, sharded_offsets
        )
