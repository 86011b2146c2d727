"""RMSNorm that sequence parallelism can use. Its operations are handed in."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .mcore import make_sharded_tensors_for_checkpoint


class Norm(Protocol):
    """RMSNorm of x over its last dimension."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class AddNorm(Protocol):
    """RMSNorm of x + residual, and that sum."""

    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x²) + ε) · weight over the last dimension (arXiv 1910.07467), statistics in fp32.

    megatron-core's own refuses sequence parallelism. Under it each rank sees only its rows, so the weight's
    gradient must be summed over the tensor-parallel group: `sequence_parallel` on the weight asks for that.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        rms_norm: Norm,
        add_rms_norm: AddNorm,
        **unused: Any,
    ) -> None:
        super().__init__()
        del unused
        self.rms_norm, self.add_rms_norm = rms_norm, add_rms_norm
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum, which is the next residual."""
        return self.add_rms_norm(x, residual, self.weight, self.eps)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight, whole on every rank, as Megatron's checkpoints describe it."""
        del metadata
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {}, sharded_offsets
        )
