"""RMSNorm, alone and after a residual addition: the operations, their definition, and the way to their kernel.

Shape suffixes: T rows, H hidden size; leading dimensions are free. Kernel: csrc/rmsnorm.cu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import KernelLibrary, library_for, require, require_served, type_code


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition: x / sqrt(mean(x²) + ε) · weight over the last dimension, in fp32 at least; as x."""
    return _normalise(x, weight, eps)[0]


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition: the sum, rounded to the type of x, and its norm; returns (norm, sum)."""
    total = (_wide(x) + _wide(residual)).to(x.dtype)
    return rms_norm_ref(total, weight, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) with statistics in fp32.

    Args:
        x: (…, H), float32, float16 or bfloat16 (float64 on the CPU).
        weight: (H,), the type of x.
        eps: added to the mean square.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check("rms_norm", x, weight)
    return _forward(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and that sum, which is the next residual: (norm, sum), each like x.

    Saves the traffic of an addition of its own: 8 bytes an element forward where two operations move 10.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check("add_rms_norm", x, weight)
    require("add_rms_norm", "x and residual are alike", _alike(x, residual), x, residual)
    normed, total, _ = _add_forward(x, residual, weight, eps)
    return normed, total


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype


def _check(operation: str, x: Tensor, weight: Tensor) -> None:
    require_served(operation, x)
    fits = weight.dim() == 1 and x.dim() > 0 and x.shape[-1] == weight.shape[0] and x.dtype == weight.dtype
    require(
        operation, "weight is (H,) of the type of x (…, H), H > 0", fits and weight.numel() > 0, x, weight
    )


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm like x, 1/rms (…))."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * rstd[..., None] * weight.to(wide.dtype)).to(x.dtype), rstd


@torch.library.custom_op("paralign::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm like x, 1/rms (…) for the backward pass)."""
    if library := library_for(x):
        normed, _, rstd = launch_forward(library, x, None, weight, eps)
        return normed, rstd
    return _normalise(x.contiguous(), weight, eps)


@torch.library.custom_op("paralign::add_rms_norm", mutates_args=())
def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if library := library_for(x):
        return launch_forward(library, x, residual, weight, eps)
    total = (_wide(x) + _wide(residual)).to(x.dtype).contiguous()
    normed, rstd = _normalise(total, weight, eps)
    return normed, total, rstd


@torch.library.custom_op("paralign::rms_norm_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx, dweight); dx includes dsum, the gradient that reaches x past the norm."""
    if library := library_for(x):
        return launch_backward(library, x, weight, rstd, dy, dsum)
    wide, dwide = _wide(x.contiguous()), _wide(dy.contiguous())
    normed = wide * rstd[..., None]
    weighted = dwide * weight.to(wide.dtype)
    projection = torch.einsum("...h,...h->...", weighted, normed) / x.shape[-1]
    dweight = torch.einsum("...h,...h->h", dwide, normed)
    dx = weighted.addcmul_(normed, projection[..., None], value=-1).mul_(rstd[..., None])
    if dsum is not None:
        dx += _wide(dsum)
    return dx.to(x.dtype), dweight.to(weight.dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _fake_rstd(x)


@_add_forward.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    like_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like_x, torch.empty_like(like_x), _fake_rstd(x)


@_backward.register_fake
def _(x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dsum: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _fake_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _save_sum(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _differentiate(ctx: Any, dy: Tensor, drstd: Tensor) -> tuple[Tensor | None, ...]:
    del drstd  # never leaves this file
    x, weight, rstd = ctx.saved_tensors
    return (*_backward(x, weight, rstd, dy, None), None)


def _differentiate_sum(ctx: Any, dy: Tensor, dsum: Tensor, drstd: Tensor) -> tuple[Tensor | None, ...]:
    del drstd
    total, weight, rstd = ctx.saved_tensors
    dx, dweight = _backward(total, weight, rstd, dy, dsum)
    return dx, dx, dweight, None


_forward.register_autograd(_differentiate, setup_context=_save)
_add_forward.register_autograd(_differentiate_sum, setup_context=_save_sum)


def launch_forward(
    library: KernelLibrary, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm, sum, 1/rms) by the kernel; without a residual the sum is x."""
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    hidden = weight.shape[0]
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    code = type_code("rms_norm", x)
    if x.numel():
        library.call(
            "rms_norm_forward",
            *(x, residual, weight, normed, total, rstd, x.numel() // hidden, hidden, float(eps), code),
        )
    return normed, total, rstd


def launch_backward(
    library: KernelLibrary, x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) by the kernel; each of its blocks leaves a row of partial sums, added up in a fixed order."""
    x, weight, rstd, dy = x.contiguous(), weight.contiguous(), rstd.contiguous(), dy.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    hidden = weight.shape[0]
    dx = torch.empty_like(x)
    code = type_code("rms_norm_backward", x)
    if not x.numel():
        return dx, torch.zeros_like(weight)
    rows = x.numel() // hidden
    blocks = library.ask("rms_norm_backward_blocks", x, weight, dy, dsum, dx, rows, hidden, code)
    partial = torch.empty(blocks, hidden, dtype=torch.float32, device=x.device)
    library.call("rms_norm_backward", x, weight, dy, dsum, rstd, dx, partial, rows, hidden, blocks, code)
    return dx, partial.sum(0).to(weight.dtype)
