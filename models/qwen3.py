"""The dense Qwen3 family: Llama with norms of each query and key head. Owns no forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arch import Arch, read_arch, refuse_unless
from .family import Family
from .llama import llama_rules
from .qwen2 import refuse_sliding_windows

DEFAULT_HEAD_DIM = 128  # transformers leaves keys out of config.json that have the default of their class


def qwen3_arch(config: Mapping[str, Any]) -> Arch:
    """Reads a Qwen3 `config.json`; raises WeightsError."""
    refuse_unless(config, "attention_bias", False)
    refuse_sliding_windows(config)
    head_dim = config.get("head_dim") or DEFAULT_HEAD_DIM
    return read_arch({**config, "head_dim": head_dim}, family="qwen3", qk_norm=True)


QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), qwen3_arch, llama_rules, chat_format="chatml")
