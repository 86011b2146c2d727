"""Decoder: embedding, transformer block and head of one pipeline stage. Composes Megatron's parts and ours.

Shape suffixes: T rows of a pack, B = 1 (a micro-batch is one pack), H hidden size, R rows with a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arch import Arch
from .attention import alibi_slopes, inverse_frequencies
from .head_read import HeadOutput, HeadRead
from .layer import GatedMLP
from .mcore import (
    AttnMaskType,
    LanguageModelEmbedding,
    LanguageModule,
    MLPSubmodules,
    ModelType,
    ModuleSpec,
    ProcessGroupCollection,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlock,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayerSubmodules,
    activation,
    build_module,
    get_num_layers_to_build,
)
from .segments import Segments


@dataclass(frozen=True)
class Parts:
    """The modules that a decoder is built from, under Megatron's names; a backend gives them.

    Attributes:
        layer: the module of one layer, made of the parts before the last three.
        activation_func: (T, 1, 2F), gate first, to (T, 1, F).
        output_layer: the head of a language model; takes what `ColumnParallelLinear` takes, `vocab_size` and
            `normalised`, and is called with hidden states, a `HeadRead` and a tied weight; see models/heads.py.
        score: the scalar head; takes the configuration, the hidden size and `tp_group`.
    """

    layer: type
    input_layernorm: ModuleSpec | type
    linear_qkv: ModuleSpec | type
    q_layernorm: ModuleSpec | type
    k_layernorm: ModuleSpec | type
    core_attention: ModuleSpec | type
    linear_proj: ModuleSpec | type
    pre_mlp_layernorm: ModuleSpec | type
    linear_fc1: ModuleSpec | type
    activation_func: Callable[[Tensor], Tensor]
    linear_fc2: ModuleSpec | type
    final_layernorm: ModuleSpec | type
    output_layer: ModuleSpec | type
    score: ModuleSpec | type


def layer_spec(parts: Parts) -> ModuleSpec:
    """One decoder layer: pre-norm attention and gated MLP, each with its residual."""
    attention = SelfAttentionSubmodules(
        linear_qkv=parts.linear_qkv,
        core_attention=parts.core_attention,
        linear_proj=parts.linear_proj,
        q_layernorm=parts.q_layernorm,
        k_layernorm=parts.k_layernorm,
    )
    mlp = MLPSubmodules(
        linear_fc1=parts.linear_fc1,
        linear_fc2=parts.linear_fc2,
        activation_func=activation(parts.activation_func),
    )
    return ModuleSpec(
        module=parts.layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.input_layernorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            pre_mlp_layernorm=parts.pre_mlp_layernorm,
            mlp=ModuleSpec(module=GatedMLP, submodules=mlp),
        ),
    )


class Decoder(LanguageModule):
    """One stage of a decoder-only language model.

    Args:
        config: Megatron's, for this layout.
        arch: shape facts of the whole model.
        parts: modules and operations to build from.
        padded_vocab_size: vocabulary rounded up to a multiple of the tensor-parallel degree.
        pre_process, post_process: whether this stage embeds tokens, and whether it owns the head.
        vp_stage: which chunk of the rank's interleaved chunks this is, or None.
    """

    def __init__(
        self,
        config: TransformerConfig,
        arch: Arch,
        parts: Parts,
        *,
        padded_vocab_size: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, ProcessGroupCollection.use_mpu_process_groups())
        self.arch, self.parts = arch, parts
        self.vp_stage = vp_stage
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = arch.tied
        self.model_type = ModelType.encoder_or_decoder
        groups = self.pg_collection
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, padded_vocab_size, 0, position_embedding_type="rope", tp_group=groups.tp
            )
        layers = [layer_spec(parts)] * get_num_layers_to_build(config, vp_stage=vp_stage)
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=parts.final_layernorm),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process and arch.scalar_head:
            self.score = self._scalar_head()
        elif post_process:
            self.output_layer = build_module(
                parts.output_layer,
                config.hidden_size,
                padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and arch.tied,
                tp_group=groups.tp,
                vocab_size=arch.vocab_size,
                normalised=arch.normalised_head,
            )
        if arch.alibi:
            mine = alibi_slopes(arch.num_attention_heads).chunk(groups.tp.size())[groups.tp.rank()]
            self.register_buffer("alibi_slopes_H", mine, persistent=False)
        else:
            self.register_buffer("rope_frequencies", inverse_frequencies(arch), persistent=False)
        if arch.scalar_head:
            if pre_process:
                self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        elif pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def _scalar_head(self) -> torch.nn.Module:
        head: torch.nn.Module = build_module(
            self.parts.score, self.config, self.config.hidden_size, tp_group=self.pg_collection.tp
        )
        return head

    def under_scalar_head(self) -> Decoder:
        """The embedding and layers of this language model, the same modules, under a scalar head of their own."""
        other = copy(self)
        other._modules = {name: module for name, module in self._modules.items() if name != "output_layer"}
        other.arch = self.arch.with_scalar_head()
        if self.post_process:
            other.score = other._scalar_head().to(next(self.parameters()).device)
        return other

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedule hands over the previous stage's hidden states here."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens_T: Tensor,
        segments: Segments,
        read: HeadRead,
    ) -> Tensor | HeadOutput:
        """Hidden states (T, 1, H) for the next stage, or, on the last, what `read` asks of the head, (R,) each."""
        if self.arch.alibi:
            segments.alibi_slopes_H = self.alibi_slopes_H
        else:
            segments.rope = self.rope_frequencies
        hidden = self.embedding(input_ids=tokens_T[None], position_ids=None) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=segments)
        if not self.post_process:
            return hidden
        if self.arch.scalar_head:
            return self.score(hidden, read)
        weight = self.shared_embedding_or_output_weight() if self.arch.tied else None
        return self.output_layer(hidden, read, weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """What Megatron's checkpoints hold of this stage."""
        if self.arch.scalar_head:  # LanguageModule's own looks for an output layer on the last stage
            return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    def named_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters under the names of the weight rules: layers are counted over the whole model.

        The copy of tied embeddings that the last stage keeps comes under the embedding's name.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("decoder.layers."):
                local, rest = name.removeprefix("decoder.layers.").split(".", 1)
                name = f"decoder.layers.{self.decoder.layers[int(local)].layer_number - 1}.{rest}"
            elif name == "output_layer.weight" and self.arch.tied:
                name = "embedding.word_embeddings.weight"
            yield name, parameter
