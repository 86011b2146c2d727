"""The optimizer: AdamW on Megatron's distributed optimizer, and two mends that make it resumable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paralign.models.mcore import (
    DistributedDataParallel,
    build_optimizer,
    clip_grad_by_total_norm_fp32,
    gradients_for_norm,
)
from paralign.models.mcore import OptimizerConfig as MegatronOptimizerConfig

from ..config.optimizer import OptimizerConfig
from ..kernels.adamw import adamw_, clip_factor, squared_sum
from ..parallel.layout import Layout
from .state_pieces import MOMENTS, StateInPieces


class _StatePerParameter(StateInPieces):
    """Megatron's distributed optimizer over torch's AdamW, resumable.

    torch keeps `step` beside the moments of each parameter. On loading, megatron-core (to 0.19 at least) gives all
    of them one and the same tensor, which every parameter's update then increments, and looks for it among tensors
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


class _WeightsWrittenByTheUpdate(_StatePerParameter):
    """The same over `FusedAdamW`, which writes the model's weights in the pass that updates the main ones."""

    def __init__(self, adamw: torch.optim.AdamW, *arguments: Any, **options: Any) -> None:
        super().__init__(FusedAdamW(adamw.param_groups), *arguments, **options)
        self.optimizer.model_shards = self._model_shards()

    def _copy_main_params_to_model_params(self) -> None:
        """Nothing is left to copy."""

    def _model_shards(self) -> dict[Tensor, Tensor]:
        """For each fp32 main parameter that is a copy, the part of the model's weight buffer it stands for."""
        shards = {}
        for mains, weights in zip(self.shard_fp32_from_float16_groups, self.model_float16_groups):
            for main, weight in zip(mains, weights):
                buffer, _, bucket = self.model_param_gbuf_map[weight]
                place = self._get_model_param_range_map(weight)["gbuf_world_in_bucket"]
                shards[main] = self.buffers[buffer].buckets[bucket].param_data[place.start : place.end]
        return shards


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW with the same groups and the same state, whose step is one operation for each shard.

    So a checkpoint of either goes on under the other. The state is there before the first step; moments that lie in
    the host's memory come to the parameter's device for the operation, and go back.

    Attributes:
        factor: float32 scalar that gradients are multiplied by; set before each step.
        model_shards: for a main parameter in another precision than the model's, where its rounding goes.
    """

    factor: Tensor
    model_shards: dict[Tensor, Tensor]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's own, which takes state to the parameter's device; moments stay where they were made."""
        homes = {
            parameter: {name: state[name] for name in MOMENTS} for parameter, state in self.state.items()
        }
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        others = {number: dict(state) for number, state in state_dict["state"].items()}
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, moment in homes.get(parameter, {}).items():
                moment.copy_(others[number].pop(name))
        super().load_state_dict({**state_dict, "state": others})
        for parameter, home in homes.items():
            self.state[parameter] |= home

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip, update and cast: 30 bytes a parameter in bf16."""
        del closure  # Megatron has none
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                kept = [state[name] for name in MOMENTS]
                moments = [moment.to(parameter.device, non_blocking=True) for moment in kept]
                adamw_(
                    parameter.detach(),
                    parameter.grad,
                    moments[0],
                    moments[1],
                    self.model_shards.get(parameter),
                    self.factor,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=int(state["step"]),
                )
                for moment, home in zip(moments, kept):
                    if moment is not home:
                        home.copy_(moment, non_blocking=True)


@dataclass(frozen=True)
class UpdateResult:
    """What one update did: the global gradient norm before clipping, and whether weights changed."""

    grad_norm: float
    updated: bool


class Optimizer:
    """AdamW (arXiv 1711.05101) with fp32 main weights, its state sharded over data-parallel ranks.

    Weight decay is left out for norms and biases, that is, for parameters of one dimension.

    Args:
        fused: clip, update and cast to the model's precision in one operation (kernels/adamw.py) for each shard,
            where Megatron scales gradients, runs torch's AdamW and copies weights one after another. With
            `optimizer_cpu_offload` always.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        config: OptimizerConfig,
        layout: Layout,
        dtype: torch.dtype,
        *,
        fused: bool = False,
    ) -> None:
        self.chunks = list(chunks)
        self.config = config
        self.fused = fused = fused or config.optimizer_cpu_offload
        self._squares: Tensor  # Σ g² of the gradients whose norm was taken last
        self.megatron = build_optimizer(
            _WeightsWrittenByTheUpdate if fused else _StatePerParameter,
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
            _allocate_state(part.optimizer, config.optimizer_cpu_offload * config.optimizer_offload_fraction)

    def zero_grad(self) -> None:
        """Clear the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, lr: float) -> UpdateResult:
        """Take the norm and update; nothing changes if it is not finite. Collective."""
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            return UpdateResult(norm, updated=False)
        self.update(lr)
        return UpdateResult(norm, updated=True)

    def gradient_norm(self) -> float:
        """Take the reduced gradients over, and give their global norm, the same on all ranks. Collective."""
        self.megatron.prepare_grads()
        self._squares = self._squared_norm()
        return math.sqrt(self._squares.item())

    def update(self, lr: float) -> None:
        """Clip the gradients whose norm was taken last to `clip_grad`, and update the weights. Collective.

        Until it is called, neither weights nor the optimizer's state have changed.
        """
        for group in self.megatron.param_groups:
            group["foreach"] = False  # torch chooses it on GPUs; its temporaries are as large as all weights
            group["lr"] = lr
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        for part in self.megatron.chained_optimizers:
            if self.fused:
                part.optimizer.factor = clip_factor(self._squares, self.config.clip_grad)
            elif self.config.clip_grad > 0:
                norm = math.sqrt(self._squares.item())
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.config.clip_grad, norm)
        self._gather_again()
        self.megatron.step_with_ready_grads()
        if self.config.optimizer_cpu_offload and self._squares.is_cuda:
            torch.cuda.current_stream().synchronize()  # a checkpoint reads the moments on the host

    def main_weights(self) -> dict[Tensor, tuple[int, Tensor]]:
        """By weight in a lower precision: the fp32 main weight of the part that this rank updates.

        Returns:
            Where the part begins in the flat weight, and the part, float32 (N,). Empty where weights are fp32.
        """
        return {
            weight: (part._get_model_param_range_map(weight)["param"].start, main)
            for part in self.megatron.chained_optimizers
            for mains, weights in zip(part.shard_fp32_from_float16_groups, part.model_float16_groups)
            for main, weight in zip(mains, weights)
        }

    def _gather_again(self) -> None:
        """With `overlap_param_gather`: let the next forward pass gather the weights that are about to change.

        Megatron forgets at the end of a backward pass that they were gathered. Whoever gathers them between that and
        the update, as `Model.synchronize` does, would make the next step train on the shards of the one before.
        """
        for chunk in self.chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.param_gather_dispatched = False

    def _squared_norm(self) -> Tensor:
        """Σ g² over all ranks, float64: one pass over the shards, and the host waits once, not for each of them."""
        total = torch.zeros((), dtype=torch.float64, device=next(self.chunks[0].parameters()).device)
        for part in self.megatron.chained_optimizers:
            gradients = gradients_for_norm(part)
            own = squared_sum(*gradients) if gradients else torch.zeros_like(total)
            dist.all_reduce(own, group=part.get_grad_stats_parallel_group())
            total += own
        return total


def _allocate_state(optimizer: torch.optim.Optimizer, offloaded: float) -> None:
    """Give AdamW's state its shape before the first step: a checkpoint is described from it.

    Args:
        offloaded: share of the moments that lies in the host's memory, from the first parameters on.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    left = offloaded * sum(parameter.numel() for parameter in parameters)
    for parameter in parameters:
        place = (
            {"device": "cpu", "pin_memory": parameter.is_cuda} if left > 0 else {"device": parameter.device}
        )
        left -= parameter.numel()
        moments = {name: torch.zeros(parameter.shape, dtype=parameter.dtype, **place) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
