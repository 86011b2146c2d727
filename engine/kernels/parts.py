"""Which modules and operations the decoder is built from. Owns the choice; the rooms beside it own the operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from paralign.models.attention import Backend, PackedAttention, rotate
from paralign.models.decoder import Parts
from paralign.models.errors import RecipeError
from paralign.models.mcore import ModuleSpec
from paralign.models.norm import RMSNorm

from .head import read_head
from .library import find_library
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .swiglu import swiglu

Kernels = Literal["auto", "reference", "required"]


def fused(kernels: Kernels) -> bool:
    """Whether our operations are taken, by the model and by the optimizer.

    Args:
        kernels: `auto` takes our operations where their kernels can run and torch's elsewhere, `reference` takes
            torch's, `required` is `auto`, and an error where it would fall back.

    Raises:
        RecipeError: the kernels are required and cannot be used.
    """
    if kernels == "reference":
        return False
    found = find_library()
    if kernels == "required" and found.library is None:
        raise RecipeError(f"model.kernels: required, but they are {found.reason}; or set it to auto")
    return found.library is not None


def choose_parts(kernels: Kernels = "auto", attention_backend: Backend = "auto") -> Parts:
    """The decoder's parts; see `fused`, and `choose_kernel` of models/attention.py."""
    parts = fused_parts() if fused(kernels) else torch_parts()
    return replace(parts, attention_backend=attention_backend)


def fused_parts() -> Parts:
    """Our operations: their kernels on CUDA, their references elsewhere."""
    return Parts(
        norm=ModuleSpec(module=RMSNorm, params={"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}),
        core_attention=PackedAttention,
        rotate=rope,
        activation=swiglu,
        read_head=read_head,
    )


def torch_parts() -> Parts:
    """What torch has of its own, each in the type of its input; faster on the CPU than our references."""
    return Parts(
        norm=ModuleSpec(
            module=RMSNorm, params={"rms_norm": _torch_rms_norm, "add_rms_norm": _torch_add_rms_norm}
        ),
        core_attention=PackedAttention,
        rotate=rotate,
        activation=_torch_swiglu,
        read_head=read_head,
    )


def describe_kernels(kernels: Kernels) -> str:
    """Which implementation runs, for the start of a run."""
    if kernels == "reference":
        return "torch, as the recipe says, but for the head"
    found = find_library()
    if found.library is None:
        return f"torch ({found.reason})"
    return f"CUDA, {', '.join(found.architectures)}"


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _torch_rms_norm(total, weight, eps), total


def _torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
