"""Losses over packed batches, by the name that a recipe gives them."""

from .base import Objective
from .sft import SFT

OBJECTIVES: dict[str, type[Objective]] = {"sft": SFT}
