"""One decoder layer, with the residual addition before its second norm done by that norm; what it recomputes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .mcore import MLP, MLPSubmodules, ProcessGroupCollection, TransformerLayer
from .recompute import free_until_backward
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
        to_attend = self.input_layernorm(hidden_states)
        attended, _ = self.self_attention(
            to_attend, attention_mask=attention_mask, packed_seq_params=packed_seq_params
        )
        if self.recompute_input_layernorm:
            free_until_backward(attended, (to_attend, partial(self.input_layernorm, hidden_states)))
        normed, residual = self.pre_mlp_layernorm.after_adding(attended, hidden_states)
        out, _ = self.mlp(normed)
        output = residual + out
        if self.recompute_pre_mlp_layernorm:  # before the MLP's own, which begins with it
            free_until_backward(output, (normed, partial(self.pre_mlp_layernorm, residual)))
        return output, None


class GatedMLP(MLP):
    """Megatron's MLP without biases. Its first product is all that `recompute_modules: mlp` computes again."""

    def __init__(self, config: Any, submodules: MLPSubmodules, **unused: Any) -> None:
        del unused  # what a layer hands to an MLP that is not Megatron's own differs by version
        super().__init__(config, submodules, tp_group=ProcessGroupCollection.use_mpu_process_groups().tp)

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """(T, 1, H) to (T, 1, H); the second value is Megatron's bias."""
        del unused
        gate_up, _ = self.linear_fc1(hidden_states)
        activated = self.activation_func(gate_up)
        out, _ = self.linear_fc2(activated)
        activation = (activated, partial(self.activation_func, gate_up))
        if "mlp" in self.config.recompute_modules:
            free_until_backward(out, (gate_up, lambda: self.linear_fc1(hidden_states)[0]), activation)
        elif "mlp_act" in self.config.recompute_modules:
            free_until_backward(out, activation)
        return out, None
