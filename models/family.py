"""What a family of models is: how its config is read and which rules its weights follow. Owns no family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .arch import Arch
from .weights import Rule


@dataclass(frozen=True)
class Family:
    """Everything Paralign knows of a family; the one thing a new family's file must define.

    Attributes:
        name: Hugging Face's `model_type`.
        architectures: the classes that `config.json` may name.
        read_arch: from a parsed `config.json`; raises WeightsError for what the forward pass does not do.
        rules: one for each native tensor, in the order of the forward pass.
        chat_format: name of the chat format that its instruction-tuned models use.
    """

    name: str
    architectures: tuple[str, ...]
    read_arch: Callable[[Mapping[str, Any]], Arch]
    rules: Callable[[Arch], tuple[Rule, ...]]
    chat_format: str
