"""The Qwen2 and Qwen2.5 family: Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arch import Arch, read_arch, refuse_unless, shown
from .errors import WeightsError
from .family import Family
from .llama import llama_rules


def qwen2_arch(config: Mapping[str, Any]) -> Arch:
    """Reads a Qwen2 `config.json`; raises WeightsError."""
    refuse_sliding_windows(config)
    return read_arch(config, family="qwen2", qkv_bias=True)


def refuse_sliding_windows(config: Mapping[str, Any]) -> None:
    """Raises WeightsError if a layer sees less than its whole segment."""
    refuse_unless(config, "use_sliding_window", False)
    types = config.get("layer_types") or []
    windowed = [name for name in types if name != "full_attention"] if isinstance(types, list) else types
    if windowed:
        raise WeightsError(
            f"config.json layer_types: read {shown(windowed)}; only 'full_attention' is supported"
        )


QWEN2 = Family(
    "qwen2",
    ("Qwen2ForCausalLM",),
    qwen2_arch,
    llama_rules,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
)
