"""AdamW over flat fp32 buffers with global-norm clipping and the cast to the model's precision in one pass.

The optimizer's state and its sharding are training/optim.py's. Shape suffix: N parameters. Kernel: csrc/adamw.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import KernelLibrary, library_for, require, type_code

PARTIAL_SUMS = (
    1024  # of a vector's sum of squares; their order is fixed, so that the norm never changes between runs
)
BLOCK = 1024  # elements that a block takes at once


def squared_sum(*vectors: Tensor) -> Tensor:
    """Σ x² over flat fp32 buffers of one device, at least one: float64 scalar there, the same in every run.

    Raises:
        ValueError: one is no dense fp32 vector.
    """
    for x_N in vectors:
        dense = x_N.dtype == torch.float32 and x_N.dim() == 1 and x_N.is_contiguous()
        require("squared_sum", "dense float32 vectors", dense, x_N)
    if library := library_for(vectors[0]):
        return launch_squared_sum(library, *vectors)
    return torch.stack([x_N.double().square().sum() for x_N in vectors]).sum()


def clip_factor(squared_norm: Tensor, clip_grad: float) -> Tensor:
    """What gradients are multiplied by so that their global norm is at most `clip_grad`: float32 scalar.

    Stays on the device: nobody waits for the norm. `clip_grad` 0 leaves gradients as they are.

    Args:
        squared_norm: Σ g² over all ranks.
    """
    if clip_grad <= 0:
        return torch.ones((), dtype=torch.float32, device=squared_norm.device)
    return (clip_grad / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0).float()


def adamw_(
    param_N: Tensor,
    grad_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    low_N: Tensor | None,
    factor: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One AdamW update (arXiv 1711.05101) in place; the gradient is multiplied by `factor` and not written.

    Args:
        param_N, grad_N, exp_avg_N, exp_avg_sq_N: dense float32 (N,).
        low_N: the model's copy of the parameters, in any type, written with the rounded result; or None.
        factor: float32 scalar on the same device, from `clip_factor`.
        step: updates done, this one included.

    Raises:
        ValueError: a buffer is not dense, not float32, or of another length; `factor` is no float32 scalar;
            `step` is not positive.
    """
    buffers = (param_N, grad_N, exp_avg_N, exp_avg_sq_N)
    fits = all(
        x.dtype == torch.float32 and x.dim() == 1 and x.is_contiguous() and x.shape == param_N.shape
        for x in buffers
    )
    require("adamw_", "four dense float32 vectors of one length", fits, *buffers)
    if low_N is not None:
        require(
            "adamw_",
            "the low-precision copy is dense and as long",
            low_N.is_contiguous() and low_N.shape == param_N.shape,
            low_N,
        )
    scalar = factor.dtype == torch.float32 and factor.dim() == 0 and factor.device == param_N.device
    require("adamw_", "the factor is a float32 scalar where the parameters are", scalar, factor)
    if step < 1:
        raise ValueError(f"adamw_: step {step}; the first update is number 1")
    corrections = (1 - betas[0] ** step, 1 - betas[1] ** step)
    _adamw(*buffers, low_N, factor, lr, *betas, eps, weight_decay, *corrections)


@torch.library.custom_op("paralign::adamw_", mutates_args=("param", "exp_avg", "exp_avg_sq", "low"))
def _adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor | None,
    factor: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    correction1: float,
    correction2: float,
) -> None:
    if library := library_for(param):
        numbers = (lr, beta1, beta2, eps, decay, correction1, correction2)
        launch(library, param, grad, exp_avg, exp_avg_sq, low, factor, *numbers)
        return
    clipped = grad * factor
    exp_avg.mul_(beta1).add_(clipped, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(clipped, clipped, value=1 - beta2)
    param.mul_(1 - lr * decay)
    param.addcdiv_(exp_avg, (exp_avg_sq / correction2).sqrt_().add_(eps), value=-lr / correction1)
    if low is not None:
        low.copy_(param)


@_adamw.register_fake
def _(*arguments: object) -> None:
    del arguments


def launch_squared_sum(library: KernelLibrary, *vectors: Tensor, blocks: int = PARTIAL_SUMS) -> Tensor:
    """A launch for each vector, which leaves a partial sum a block; all of them added up in float64, once."""
    partial = torch.zeros(len(vectors), blocks, dtype=torch.float32, device=vectors[0].device)
    for x_N, sums in zip(vectors, partial):
        if x_N.numel():
            library.call("squared_sum", x_N, sums, x_N.numel(), min(blocks, -(-x_N.numel() // BLOCK)))
    return partial.double().sum()


def launch(
    library: KernelLibrary,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor | None,
    factor: Tensor,
    *numbers: float,
) -> None:
    """The kernel; `numbers` are learning rate, betas, ε, decay and the two bias corrections."""
    code = type_code("adamw_", param if low is None else low)
    if param.numel():
        library.call(
            "adamw", param, grad, exp_avg, exp_avg_sq, low, factor, param.numel(), *map(float, numbers), code
        )
