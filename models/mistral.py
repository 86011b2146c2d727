"""The dense Mistral family: Llama's weights, and a sliding window that must be off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arch import Arch, read_arch, shown
from .errors import WeightsError
from .family import Family
from .llama import llama_rules

DEFAULT_WINDOW = 4096


def mistral_arch(config: Mapping[str, Any]) -> Arch:
    """Reads a Mistral `config.json`; raises WeightsError, also if a row could lie outside the sliding window.

    A row sees itself and the `sliding_window` - 1 rows before it, and no sample may be longer than
    `max_position_embeddings`: a window of that length or more leaves nothing out. The class has no
    `layer_types`: its one window is that of all layers.
    """
    arch = read_arch(config, family="mistral")
    window, longest = config.get("sliding_window"), arch.max_position_embeddings
    if window is not None and (type(window) is not int or window < longest):
        raise WeightsError(
            f"config.json sliding_window: read {shown(window)} ({DEFAULT_WINDOW} where the key is absent); only "
            f"null, or at least max_position_embeddings = {longest}, is supported; set max_position_embeddings to "
            "the window if no sample is longer, or train a model that has none"
        )
    return arch


MISTRAL = Family(
    "mistral",
    ("MistralForCausalLM",),
    mistral_arch,
    llama_rules,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": DEFAULT_WINDOW,
    },
)
