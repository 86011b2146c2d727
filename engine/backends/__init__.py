"""What a model is built from, by backend. Checks of a recipe need no import that takes long."""

from __future__ import annotations

from paralign.models.arch import Arch
from paralign.models.errors import RecipeError

from ..config.model import ModelConfig
from .base import Backend


def backend_of(section: ModelConfig) -> Backend:
    """The backend that a recipe names."""
    from .ours import Ours

    return Ours(section.kernels, section.attention_backend)


def check_backend(section: ModelConfig, arch: Arch) -> None:
    """Raises RecipeError where the backend has no part for this model, on whatever device."""
    if section.attention_backend == "varlen" and arch.alibi:
        raise RecipeError("model.attention_backend: varlen takes no ALiBi slopes; or set it to auto")


__all__ = ["Backend", "backend_of", "check_backend"]
