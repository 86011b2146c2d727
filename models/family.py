"""What a family of models is: how its config is read and which rules its weights follow."""

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
        read_arch: from a `config.json` with the defaults filled in, see `arch`; raises WeightsError for what
            the forward pass does not do.
        rules: one for each native tensor, in the order of the forward pass.
        defaults: what transformers' config class takes for keys that a `config.json` leaves out, where an
            absent key would be refused or read otherwise. Its shape (vocabulary, sizes, layers, heads) a
            config must state.
    """

    name: str
    architectures: tuple[str, ...]
    read_arch: Callable[[Mapping[str, Any]], Arch]
    rules: Callable[[Arch], tuple[Rule, ...]]
    defaults: Mapping[str, Any]

    def arch(self, config: Mapping[str, Any]) -> Arch:
        """Shape facts from a parsed `config.json`, as transformers would open it; raises WeightsError.

        Defaults are for absent keys alone: a null is a value, such as no sliding window.
        """
        return self.read_arch({**self.defaults, **config})
