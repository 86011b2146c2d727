"""The optimizer: AdamW on Megatron's distributed optimizer. Owns its construction, its step and two mends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paralign.models.mcore import (
    DistributedDataParallel,
    DistributedOptimizer,
    clip_grad_by_total_norm_fp32,
    get_megatron_optimizer,
)
from paralign.models.mcore import OptimizerConfig as MegatronOptimizerConfig

from .layout import Layout
from .schedule import OptimizerConfig


class _StatePerParameter(DistributedOptimizer):
    """Megatron's distributed optimizer over torch's AdamW, resumable.

    torch keeps `step` beside the moments of each parameter. On loading, megatron-core 0.16 gives all of them
    one and the same tensor, which every parameter's update then increments, and looks for it among tensors
    that do not have it. Each parameter gets its own here.
    """

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        with torch.no_grad():  # in fp32 the main parameters are leaves that require a gradient
            super()._set_main_param_and_optimizer_states(model_param, tensors)


@dataclass(frozen=True)
class UpdateResult:
    """What one update did: the global gradient norm before clipping, and whether weights changed."""

    grad_norm: float
    updated: bool


class Optimizer:
    """AdamW (arXiv 1711.05101) with fp32 main weights, its state sharded over data-parallel ranks.

    Weight decay is left out for norms and biases, that is, for parameters of one dimension.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        config: OptimizerConfig,
        layout: Layout,
        dtype: torch.dtype,
    ) -> None:
        self.chunks = list(chunks)
        self.config = config
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
                overlap_param_gather=layout.config.overlap_param_gather,
            ),
            self.chunks,
        )
        for part in self.megatron.chained_optimizers:
            part.__class__ = _StatePerParameter
            _allocate_state(part.optimizer)

    def zero_grad(self) -> None:
        """Clear the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, lr: float) -> UpdateResult:
        """Clip the reduced gradients to `clip_grad` and update; nothing changes if their norm is not finite."""
        for group in self.megatron.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        if not math.isfinite(norm):
            return UpdateResult(norm, updated=False)
        if self.config.clip_grad > 0:
            for part in self.megatron.chained_optimizers:
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.config.clip_grad, norm)
        self.megatron.step_with_ready_grads()
        return UpdateResult(norm, updated=True)

    def synchronize_weights(self) -> None:
        """Make the model's weights current on every rank.

        With `overlap_param_gather` the gather of an update is left to the next forward pass; whoever reads
        weights before that (saving, export, evaluation) calls this first.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW's state its shape before the first step: a checkpoint is described from it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }
