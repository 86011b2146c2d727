"""Decoders: shape facts, weight rules and forward passes; here is the table of families.

Importing it costs torch and nothing else; what needs megatron-core is imported from its own module.
"""

from collections.abc import Mapping
from typing import Any

from .arch import Arch, shown
from .baichuan2 import BAICHUAN2
from .errors import WeightsError
from .family import Family
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .weights import Rule, count_parameters

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, BAICHUAN2)}


def arch_from_hf(config: Mapping[str, Any]) -> Arch:
    """Shape facts from a parsed `config.json`.

    The class in `architectures` decides; a config that names none goes by `model_type`. A family's
    `…ForSequenceClassification` with one label is its decoder with a scalar head.

    Raises:
        WeightsError: an unknown architecture, or a key that the forward pass does not follow.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"config.json architectures: read {shown(names)}; expected a list of names")
    for family in FAMILIES.values():
        if set(names) & {scoring_class(name) for name in family.architectures}:
            labels = config.get("id2label") or {0: "", 1: ""}
            if not isinstance(labels, Mapping) or len(labels) != 1:
                raise WeightsError(
                    f"config.json id2label: read {shown(config.get('id2label'))}; a reward model has one label"
                )
            return family.arch(config).with_scalar_head()
        if set(names) & set(family.architectures) or (not names and config.get("model_type") == family.name):
            return family.arch(config)
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    found = ", ".join(names[:9]) or f"none, and model_type {shown(config.get('model_type'))}"
    raise WeightsError(f"config.json architectures: read {found}; known are {known}")


def scoring_class(architecture: str) -> str:
    """Hugging Face's class of the decoder `architecture` with a scalar head."""
    return architecture.replace("ForCausalLM", "ForSequenceClassification")


def rules_for(arch: Arch) -> tuple[Rule, ...]:
    """One rule for each native tensor, in the order of the forward pass."""
    return FAMILIES[arch.family].rules(arch)


def parameter_count(arch: Arch) -> int:
    """Parameters of the model, exact; a tied head counts once, vocabulary padding not at all."""
    return count_parameters(rules_for(arch))
