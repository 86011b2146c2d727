"""SwiGLU on the concatenated projections [gate | up]: the operation, its definition, and the way to its kernel.

Shape suffixes: F width of the feed-forward layer; leading dimensions are free. Kernel: csrc/swiglu.cu.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import KernelLibrary, library_for, require, require_served, type_code


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """The definition: silu(gate) · up, in fp32 at least; the type of its input."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202); only the input is kept for the backward pass.

    Args:
        gate_up: (…, 2F), gate first; float32, float16 or bfloat16 (float64 on the CPU).

    Returns:
        (…, F).

    Raises:
        ValueError: the last dimension is odd; or another type.
    """
    require_served("swiglu", gate_up)
    fits = gate_up.dim() > 0 and gate_up.shape[-1] % 2 == 0
    require("swiglu", "the last dimension holds gate and up, each as wide", fits, gate_up)
    return _forward(gate_up)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.library.custom_op("paralign::swiglu", mutates_args=())
def _forward(gate_up: Tensor) -> Tensor:
    if library := library_for(gate_up):
        return launch_forward(library, gate_up)
    return swiglu_ref(gate_up.contiguous())


@torch.library.custom_op("paralign::swiglu_backward", mutates_args=())
def _backward(gate_up: Tensor, dout: Tensor) -> Tensor:
    if library := library_for(gate_up):
        return launch_backward(library, gate_up, dout)
    gate, up = _wide(gate_up.contiguous()).chunk(2, dim=-1)
    dwide = _wide(dout.contiguous())
    dgate = torch.ops.aten.silu_backward(dwide * up, gate)
    return torch.cat((dgate, F.silu(gate).mul_(dwide)), dim=-1).to(gate_up.dtype)


@_forward.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_backward.register_fake
def _(gate_up: Tensor, dout: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx: Any, dout: Tensor) -> Tensor:
    return _backward(ctx.saved_tensors[0], dout)


_forward.register_autograd(_differentiate, setup_context=_save)


def launch_forward(library: KernelLibrary, gate_up: Tensor) -> Tensor:
    """The kernel's forward pass."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    code = type_code("swiglu", gate_up)
    if out.numel():
        library.call("swiglu_forward", gate_up, out, out.numel() // width, width, code)
    return out


def launch_backward(library: KernelLibrary, gate_up: Tensor, dout: Tensor) -> Tensor:
    """The kernel's backward pass: the gradient of the input."""
    gate_up, dout = gate_up.contiguous(), dout.contiguous()
    width = dout.shape[-1]
    gradient = torch.empty_like(gate_up)
    code = type_code("swiglu_backward", gate_up)
    if dout.numel():
        library.call("swiglu_backward", gate_up, dout, gradient, dout.numel() // width, width, code)
    return gradient
