"""Our backend: megatron-core's linears, our norms, attention, activation and head. kernels/ owns the operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paralign.models.arch import Arch
from paralign.models.attention import (
    AttentionBackend,
    Kernel,
    PackedAttention,
    Rotate,
    alibi_attention,
    choose_kernel,
    rotate,
    sdpa_attention,
)
from paralign.models.decoder import Parts
from paralign.models.heads import ReadHead, ScalarHead, VocabularyHead
from paralign.models.layer import Layer
from paralign.models.mcore import ColumnParallelLinear, IdentityOp, ModuleSpec, RowParallelLinear
from paralign.models.norm import AddNorm, Norm, RMSNorm

from ..kernels.head import read_head
from ..kernels.library import find_library
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope import rope
from ..kernels.swiglu import swiglu

Kernels = Literal["auto", "reference", "required"]


@dataclass(frozen=True)
class Operations:
    """What the modules of our backend do their work with."""

    rms_norm: Norm
    add_rms_norm: AddNorm
    rotate: Rotate
    swiglu: Callable[[Tensor], Tensor]  # (T, 1, 2F), gate first, to (T, 1, F)
    read_head: ReadHead = read_head


@dataclass(frozen=True)
class Ours:
    """Fused operations where their kernels can run, torch's elsewhere.

    Args:
        kernels: `auto` takes our operations where their kernels can run and torch's elsewhere, `reference` takes
            torch's; `required` is `auto` behind a check (`check_kernels`).
        attention: see `choose_kernel` of models/attention.py.
    """

    kernels: Kernels = "auto"
    attention: AttentionBackend = "auto"

    @property
    def fuses_updates(self) -> bool:
        """See Backend."""
        return self.kernels != "reference" and find_library().library is not None

    def parts(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> Parts:
        """See Backend."""
        operations = FUSED if self.fuses_updates else TORCH
        return parts_of(arch, operations, self._attention_kernel(arch, device, dtype))

    def config(self) -> dict[str, Any]:
        """See Backend."""
        return {
            # models/weight_gradient.py offers what this looks for in apex.
            "gradient_accumulation_fusion": self.kernels != "reference",
            "masked_softmax_fusion": False,
            # Their flag for an activation that takes gate and up together; ours is among the parts.
            "use_te_activation_func": True,
            "bias_activation_fusion": False,
        }

    def facts(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """See Backend."""
        attention, found = self._attention_kernel(arch, device, dtype), find_library()
        by_segment = ", a call for each segment" if attention in (alibi_attention, sdpa_attention) else ""
        kernels = f"torch ({found.reason})"
        if self.kernels == "reference":
            kernels = "torch, as the recipe says, but for the head"
        elif found.library is not None:
            kernels = f"CUDA, {', '.join(found.architectures)}"
        return {"attention": f"{attention.__name__} on {device.type}{by_segment}", "kernels": kernels}

    def _attention_kernel(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> Kernel:
        return choose_kernel(device, dtype, alibi=arch.alibi, backend=self.attention)


def parts_of(arch: Arch, operations: Operations, attention: Kernel) -> Parts:
    """Megatron's linears and our other modules, which work with these operations."""
    norm = ModuleSpec(
        module=RMSNorm,
        params={"rms_norm": operations.rms_norm, "add_rms_norm": operations.add_rms_norm},
    )
    return Parts(
        layer=Layer,
        input_layernorm=norm,
        linear_qkv=ColumnParallelLinear,
        q_layernorm=norm if arch.qk_norm else IdentityOp,
        k_layernorm=norm if arch.qk_norm else IdentityOp,
        core_attention=ModuleSpec(
            module=PackedAttention, params={"rotate": operations.rotate, "kernel": attention}
        ),
        linear_proj=RowParallelLinear,
        pre_mlp_layernorm=norm,
        linear_fc1=ColumnParallelLinear,
        activation_func=operations.swiglu,
        linear_fc2=RowParallelLinear,
        final_layernorm=norm,
        output_layer=ModuleSpec(module=VocabularyHead, params={"read_head": operations.read_head}),
        score=ScalarHead,
    )


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _torch_rms_norm(total, weight, eps), total


def _torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# Kernels on CUDA, their references elsewhere.
FUSED = Operations(rms_norm, add_rms_norm, rope, swiglu)
# What torch has of its own, each in the type of its input; faster on the CPU than our references.
TORCH = Operations(_torch_rms_norm, _torch_add_rms_norm, rotate, _torch_swiglu)
