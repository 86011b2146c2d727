"""Keys that the recipe sections of several objectives share."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..config.decoding import Section


class AnswerSection(Section):
    """An objective over answers to prompts.

    Attributes:
        share_prefix: computes a prompt once for all its answers; false repeats it, for comparison.
    """

    share_prefix: bool = True

    @property
    def range_of_scores(self) -> tuple[float, float] | None:
        """Lowest and highest score in the data, where the objective reads scores."""
        return None


class ReferenceSection(AnswerSection):
    """An objective that compares with a reference model.

    Attributes:
        share_prefix: computes a prompt once for all its answers; false repeats it, for comparison.
        reference: `cached` computes its log-probabilities once, before training; `online` keeps the model.
        reference_model: a Hugging Face directory; null is the model that training starts from.
    """

    reference: Literal["cached", "online"] = "cached"
    reference_model: Path | None = None
