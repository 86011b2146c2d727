"""The Llama family (1 to 3.3): its config and its table of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .arch import Arch, read_arch, refuse_unless
from .family import Family
from .weights import GateUp, Rule, StackQKV, Vocabulary


def llama_arch(config: Mapping[str, Any]) -> Arch:
    """Reads a Llama `config.json`; raises WeightsError. `pretraining_tp` is ignored: it moves no number."""
    refuse_unless(config, "attention_bias", False)
    refuse_unless(config, "mlp_bias", False)
    return read_arch(config, family="llama")


def llama_rules(arch: Arch) -> tuple[Rule, ...]:
    """The table of a Llama-shaped decoder; `arch` adds Qwen2's biases and Qwen3's norms of q and k."""
    return decoder_rules(arch, separate_qkv)


def separate_qkv(arch: Arch, layer: int) -> Iterator[Rule]:
    """q_proj, k_proj and v_proj, each with its bias and its norm where the family has them."""
    native, hf = layer_names(layer)
    groups, heads = arch.num_query_groups, arch.num_attention_heads
    query, key = heads * arch.kv_channels, groups * arch.kv_channels
    q_k_v = [f"{hf}.self_attn.{x}_proj" for x in "qkv"]
    for kind, columns in (("weight", (arch.hidden_size,)), *((("bias", ()),) if arch.qkv_bias else ())):
        yield StackQKV(
            f"{native}.self_attention.linear_qkv.{kind}",
            tuple(f"{name}.{kind}" for name in q_k_v),
            ((query, *columns), (key, *columns), (key, *columns)),
            split=0,
            num_query_heads=heads,
            num_query_groups=groups,
        )
    for x in "qk" if arch.qk_norm else "":
        yield Rule(
            f"{native}.self_attention.{x}_layernorm.weight",
            (f"{hf}.self_attn.{x}_norm.weight",),
            ((arch.kv_channels,),),
        )


def decoder_rules(arch: Arch, qkv_rules: Callable[[Arch, int], Iterator[Rule]]) -> tuple[Rule, ...]:
    """The table of a decoder with Llama's tensor names, but for q, k and v of a layer."""
    hidden = arch.hidden_size
    vocab = (arch.vocab_size, hidden)
    head: tuple[Rule, ...] = ()
    if arch.scalar_head:
        head = (Rule("score.weight", ("score.weight",), ((1, hidden),)),)
    elif not arch.tied:
        head = (Vocabulary("output_layer.weight", ("lm_head.weight",), (vocab,), 0),)
    return (
        Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (vocab,), 0),
        *(rule for layer in range(arch.num_layers) for rule in _layer_rules(arch, layer, qkv_rules)),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),)),
        *head,
    )


def layer_names(layer: int) -> tuple[str, str]:
    """The prefixes of a layer's tensors, native and Hugging Face's."""
    return f"decoder.layers.{layer}", f"model.layers.{layer}"


def _layer_rules(arch: Arch, layer: int, qkv_rules: Callable[[Arch, int], Iterator[Rule]]) -> Iterator[Rule]:
    native, hf = layer_names(layer)
    hidden, ffn, query = arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads * arch.kv_channels

    yield Rule(f"{native}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), ((hidden,),))
    yield from qkv_rules(arch, layer)
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


LLAMA = Family(
    "llama",
    ("LlamaForCausalLM",),
    llama_arch,
    llama_rules,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
)
