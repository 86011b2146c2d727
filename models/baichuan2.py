"""The Baichuan2 family (7B, 13B): its config and its table of weights.

It differs from Llama in W_pack, which holds q, k and v as one tensor, and in NormHead, which divides the rows
of the output weight by their norm. 7B has rotary positions, 13B has ALiBi and says so by having no
`max_position_embeddings`: the two share one class name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .arch import Arch, read_arch
from .errors import WeightsError
from .family import Family
from .llama import decoder_rules, layer_names
from .weights import Rule, SplitPackedQKV

FIRST_GENERATION_VOCABULARY = 64000


def baichuan2_arch(config: Mapping[str, Any]) -> Arch:
    """Reads a Baichuan2 `config.json`; raises WeightsError."""
    if config.get("vocab_size") == FIRST_GENERATION_VOCABULARY:
        raise WeightsError(
            f"config.json vocab_size: {FIRST_GENERATION_VOCABULARY} is Baichuan's first generation, which has "
            "no normalised head; only Baichuan2 is supported"
        )
    alibi = config.get("max_position_embeddings") is None
    if alibi:
        if config.get("model_max_length") is None:
            raise WeightsError(
                "config.json max_position_embeddings: absent, and model_max_length too; a 7B (rotary) has "
                "the first, a 13B (ALiBi) the second"
            )
        config = {**config, "max_position_embeddings": config["model_max_length"]}
    return read_arch(config, family="baichuan", alibi=alibi, normalised_head=True)


def baichuan2_rules(arch: Arch) -> tuple[Rule, ...]:
    """Llama's table with W_pack for q, k and v."""
    return decoder_rules(arch, _packed_qkv)


def _packed_qkv(arch: Arch, layer: int) -> Iterator[Rule]:
    native, hf = layer_names(layer)
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    yield SplitPackedQKV(
        f"{native}.self_attention.linear_qkv.weight",
        (f"{hf}.self_attn.W_pack.weight",),
        (((heads + 2 * groups) * arch.kv_channels, arch.hidden_size),),
        split=0,
        num_query_heads=heads,
        num_query_groups=groups,
    )


# Two published classes share one name, with defaults that differ: none is filled in.
BAICHUAN2 = Family("baichuan", ("BaichuanForCausalLM",), baichuan2_arch, baichuan2_rules, defaults={})
