"""One decoder layer, with the residual addition before its second norm done by that norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .mcore import TransformerLayer
from .segments import Segments


class Layer(TransformerLayer):
    """Megatron's layer without dropout and without biases on the output projections, which no family here has.

    Megatron's own forward pass adds the residual in an operation of its own; one that adds and normalises moves
    8 bytes an element (bf16) where the two move 10. The addition at the end stays: the block hands one tensor to the
    next layer, to recomputation and to the next stage, and two would double what recomputation keeps.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: Segments | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """(T, 1, H) to (T, 1, H); the second value is Megatron's cross-attention context."""
        del unused
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            packed_seq_params=packed_seq_params,
        )
        normed, residual = self.pre_mlp_layernorm.after_adding(attended, hidden_states)
        out, _ = self.mlp(normed)
        return residual + out, None
