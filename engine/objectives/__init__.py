"""Losses over packed batches, by name. A new objective is a file and a line here."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from ..config.decoding import Section
from .base import Objective
from .cpo import CPO
from .dpo import DPO
from .kto import KTO
from .orpo import ORPO
from .reward import Reward
from .sections import AnswerSection, ReferenceSection
from .sft import SFT
from .simpo import SimPO

OBJECTIVES: dict[str, type[Objective]] = {
    objective.section.model_fields["name"].annotation.__args__[0]: objective  # type: ignore[union-attr]
    for objective in (SFT, Reward, DPO, KTO, SimPO, ORPO, CPO)
}

if TYPE_CHECKING:

    class ObjectiveConfig(Section):
        """The section of some objective."""

        name: str
else:
    ObjectiveConfig = Annotated[
        Annotated[
            reduce(or_, (objective.section for objective in OBJECTIVES.values())), Field(discriminator="name")
        ],
        BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value),
    ]


def build_objective(config: Any) -> Objective:
    """The objective of a recipe's section."""
    return OBJECTIVES[config.name](config)


__all__ = [
    "OBJECTIVES",
    "AnswerSection",
    "Objective",
    "ObjectiveConfig",
    "ReferenceSection",
    "build_objective",
]
