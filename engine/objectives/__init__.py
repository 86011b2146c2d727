"""Losses over packed batches: by the section that a recipe gives them. Owns the table."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from .base import Objective
from .dpo import DPO, DPOConfig
from .kto import KTO, KTOConfig
from .orpo import ORPO, ORPOConfig
from .reward import Reward, RewardConfig
from .sections import AnswerSection, ReferenceSection
from .sft import SFT, SFTConfig
from .simpo import SimPO, SimPOConfig

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "sft": SFT,
    "reward": Reward,
    "dpo": DPO,
    "kto": KTO,
    "simpo": SimPO,
    "orpo": ORPO,
}

ObjectiveConfig = Annotated[
    Annotated[
        SFTConfig | RewardConfig | DPOConfig | KTOConfig | SimPOConfig | ORPOConfig,
        Field(discriminator="name"),
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
