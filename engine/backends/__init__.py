"""What a model is built from, by backend. Checks of a recipe need no import that takes long."""

from __future__ import annotations

from paralign.models.arch import Arch
from paralign.models.errors import RecipeError

from ..config.model import ModelConfig
from .base import Backend


def backend_of(section: ModelConfig) -> Backend:
    """The backend that a recipe names, on the machine that trains."""
    from .ours import Ours

    check_kernels(section, launch=True)
    return Ours(section.kernels, section.attention_backend)


def check_backend(section: ModelConfig, arch: Arch) -> None:
    """Raises RecipeError where the backend has no part for this model, on whatever device.

    Required kernels are looked for where a GPU is: a machine without one checks recipes, and trains none of them.
    """
    if section.attention_backend in ("flash", "varlen") and section.dtype == "fp32":
        raise RecipeError(
            f"model.attention_backend: {section.attention_backend} runs in bf16, and model.dtype is fp32; "
            "set model.dtype: bf16, or attention_backend: auto"
        )
    if section.attention_backend == "varlen" and arch.alibi:
        raise RecipeError("model.attention_backend: varlen takes no ALiBi slopes; or set it to auto")
    if section.kernels == "required":
        import torch

        if torch.cuda.device_count():
            check_kernels(section)


def check_kernels(section: ModelConfig, *, launch: bool = False) -> None:
    """Raises RecipeError where a recipe requires the kernels and this machine cannot use them.

    Whether the device takes them is tried with `launch` only, by who trains: the trial's CUDA context would hold the
    device's memory as long as this process lives.
    """
    if section.kernels != "required":
        return
    from ..kernels.library import built_library, find_library

    if (found := find_library() if launch else built_library()).library is None:
        raise RecipeError(f"model.kernels: required, but they are {found.reason}; or set it to auto")


__all__ = ["Backend", "backend_of", "check_backend", "check_kernels"]
