"""The Llama family (1 to 3.3): its config and its table of weights. Owns no forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .arch import Arch, read_arch, refuse_unless
from .family import Family
from .weights import GateUp, Rule, StackQKV, Vocabulary


def llama_arch(config: Mapping[str, Any]) -> Arch:
    """Reads a Llama `config.json`; raises WeightsError. `pretraining_tp` is ignored: it moves no number."""
    refuse_unless(config, "attention_bias", False)
    refuse_unless(config, "mlp_bias", False)
    return read_arch(config, family="llama", qkv_bias=False)


def llama_rules(arch: Arch) -> tuple[Rule, ...]:
    """The table of a Llama-shaped decoder; `arch.qkv_bias` adds Qwen2's biases."""
    hidden = arch.hidden_size
    vocab = (arch.vocab_size, hidden)
    head = Vocabulary("output_layer.weight", ("lm_head.weight",), (vocab,), 0)
    return (
        Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (vocab,), 0),
        *(rule for layer in range(arch.num_layers) for rule in _layer_rules(arch, layer)),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),)),
        *(() if arch.tied else (head,)),
    )


def _layer_rules(arch: Arch, layer: int) -> Iterator[Rule]:
    native, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    hidden, ffn, groups = arch.hidden_size, arch.ffn_hidden_size, arch.num_query_groups
    query, key = arch.num_attention_heads * arch.kv_channels, groups * arch.kv_channels
    qkv, q_k_v = f"{native}.self_attention.linear_qkv", [f"{hf}.self_attn.{x}_proj" for x in "qkv"]

    yield Rule(f"{native}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), ((hidden,),))
    yield StackQKV(
        f"{qkv}.weight",
        tuple(f"{name}.weight" for name in q_k_v),
        ((query, hidden), (key, hidden), (key, hidden)),
        split=0,
        num_query_groups=groups,
    )
    if arch.qkv_bias:
        yield StackQKV(
            f"{qkv}.bias",
            tuple(f"{name}.bias" for name in q_k_v),
            ((query,), (key,), (key,)),
            split=0,
            num_query_groups=groups,
        )
    yield Rule(
        f"{native}.self_attention.linear_proj.weight",
        (f"{hf}.self_attn.o_proj.weight",),
        ((hidden, query),),
        split=1,
    )
    yield Rule(f"{native}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), ((hidden,),))
    yield GateUp(
        f"{native}.mlp.linear_fc1.weight",
        (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"),
        ((ffn, hidden), (ffn, hidden)),
        split=0,
    )
    yield Rule(f"{native}.mlp.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), ((hidden, ffn),), split=1)


LLAMA = Family("llama", ("LlamaForCausalLM",), llama_arch, llama_rules, chat_format="llama3")
