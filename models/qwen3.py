"""The dense Qwen3 family: Llama with norms of each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arch import Arch, read_arch, refuse_unless
from .family import Family
from .llama import llama_rules
from .qwen2 import refuse_sliding_windows


def qwen3_arch(config: Mapping[str, Any]) -> Arch:
    """Reads a Qwen3 `config.json`; raises WeightsError."""
    refuse_unless(config, "attention_bias", False)
    refuse_sliding_windows(config)
    return read_arch(config, family="qwen3", qk_norm=True)


QWEN3 = Family(
    "qwen3",
    ("Qwen3ForCausalLM",),
    qwen3_arch,
    llama_rules,
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
)
