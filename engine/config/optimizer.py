"""The optimizer's section of a recipe and the learning rate of each step. Builds no optimizer."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from .decoding import Section


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay, and the schedule of its learning rate.

    Attributes:
        lr: the peak learning rate.
        min_lr: what the learning rate decays to.
        lr_decay_style: how the learning rate falls after the warm-up.
        lr_warmup_steps: steps of linear warm-up; without this and the fraction there is none.
        lr_warmup_fraction: warm-up as a share of all steps, instead of lr_warmup_steps.
        weight_decay: decay of matrices, per unit of learning rate; norms and biases are not decayed.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_eps: added to the root of the second moment.
        clip_grad: largest norm of the whole gradient; 0 clips nothing.
        optimizer_cpu_offload: keeps AdamW's moments in the host's memory and takes them to the GPU, shard by
            shard, for the update: 8 bytes a parameter less, for twice 8 over the bus in each step.
        optimizer_offload_fraction: share of the moments that is kept there.
    """

    lr: float = Field(gt=0, allow_inf_nan=False)
    min_lr: float = Field(0.0, ge=0, allow_inf_nan=False)
    lr_decay_style: Literal["cosine", "linear", "constant"]
    lr_warmup_steps: int | None = Field(None, ge=0)
    lr_warmup_fraction: float | None = Field(None, ge=0, lt=1)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    clip_grad: float = Field(1.0, ge=0, allow_inf_nan=False)
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _agree(self) -> OptimizerConfig:
        if self.lr_warmup_steps is not None and self.lr_warmup_fraction is not None:
            raise ValueError("lr_warmup_steps and lr_warmup_fraction are both given; keep one")
        if self.optimizer_offload_fraction < 1 and not self.optimizer_cpu_offload:
            raise ValueError("optimizer_offload_fraction needs optimizer_cpu_offload; set it to true")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; lower it")
        return self


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Steps of warm-up; a fraction is the number that the recipe writes, and is rounded up to whole steps."""
    if config.lr_warmup_fraction is not None:
        # In floating point 0.07 of 100 steps is a little more than 7, and would be 8.
        return math.ceil(Fraction(repr(config.lr_warmup_fraction)) * total_steps)
    return config.lr_warmup_steps or 0


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate that step number `step`, counted from 0, is taken with.

    With W steps of warm-up, step s < W runs at lr·(s+1)/W, so that no step is spent at zero. From there on
    the rate decays over p = (s − W)/(total_steps − W), as in Megatron: step W runs at lr, and p reaches 1,
    where the rate is min_lr, one step after the last, so that the last step is not spent at zero either.
    From `total_steps` on the rate stays at min_lr (at lr, if constant).
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    p = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match config.lr_decay_style:
        case "constant":
            left = 1.0
        case "linear":
            left = 1.0 - p
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * p))
    return config.min_lr + (config.lr - config.min_lr) * left
