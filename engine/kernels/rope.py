"""Rotary embedding of a pack's queries and keys, from the position of each row in its sample.

Shape suffixes: T rows, H query heads, G key heads, D channels a head. Kernel: csrc/rope.cu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import KernelLibrary, library_for, require, require_served, type_code


def rope_ref(q_THD: Tensor, k_TGD: Tensor, positions_T: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: channels (i, i + D/2) turned by position · frequency i, in fp32 at least."""
    return _rotate(q_THD, k_TGD, positions_T, frequencies, 1.0)


def rope(q_THD: Tensor, k_TGD: Tensor, positions_T: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (RoFormer, arXiv 2104.09864), half-rotation as in Llama, of both in one launch.

    Args:
        q_THD, k_TGD: one type; slices of a fused projection are read as they lie, without a copy.
        positions_T: int64 (T,), the position of each row in its sample.
        frequencies: float32 (D/2,), scaled already where a model scales them.

    Returns:
        The turned queries and keys, dense.

    Raises:
        ValueError: shapes or types do not fit.
    """
    require_served("rope", q_THD, k_TGD)
    half = frequencies.numel()
    alike = q_THD.dtype == k_TGD.dtype and positions_T.dtype == torch.int64
    fits = (
        q_THD.dim() == k_TGD.dim() == 3
        and q_THD.shape[2] == k_TGD.shape[2] == 2 * half
        and q_THD.shape[0] == k_TGD.shape[0] == positions_T.numel()
    )
    rule = "q (T, H, D) and k (T, G, D) of one type, int64 positions (T,), frequencies (D/2,)"
    require("rope", rule, fits and alike, q_THD, k_TGD, positions_T, frequencies)
    return _rope(q_THD, k_TGD, positions_T, frequencies, 1.0)


def _rotate(
    q_THD: Tensor, k_TGD: Tensor, positions_T: Tensor, frequencies: Tensor, direction: float
) -> tuple[Tensor, Tensor]:
    # Angles are fp32 in the kernel as in transformers; the definition computes the same, even for float64.
    angles = (positions_T.float()[:, None] * frequencies.float())[:, None, :]
    wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    cosines, sines = angles.cos().to(wide), angles.sin().to(wide) * direction

    def turn(x: Tensor) -> Tensor:
        first, second = x.to(wide).chunk(2, dim=-1)
        turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
        return turned.to(x.dtype)

    return turn(q_THD), turn(k_TGD)


@torch.library.custom_op("paralign::rope", mutates_args=())
def _rope(
    q: Tensor, k: Tensor, positions: Tensor, frequencies: Tensor, direction: float
) -> tuple[Tensor, Tensor]:
    """Turned forward (1.0) or back (−1.0)."""
    if library := library_for(q):
        return launch(library, q, k, positions, frequencies, direction)
    q_out, k_out = _rotate(q, k, positions, frequencies, direction)
    return q_out.contiguous(), k_out.contiguous()


@_rope.register_fake
def _(
    q: Tensor, k: Tensor, positions: Tensor, frequencies: Tensor, direction: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.direction = inputs[4]


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    positions, frequencies = ctx.saved_tensors
    return (*_rope(dq, dk, positions, frequencies, -ctx.direction), None, None, None)


_rope.register_autograd(_differentiate, setup_context=_save)


def launch(
    library: KernelLibrary,
    q_THD: Tensor,
    k_TGD: Tensor,
    positions_T: Tensor,
    frequencies: Tensor,
    direction: float,
) -> tuple[Tensor, Tensor]:
    """The kernel; only channels must lie side by side."""
    q_THD, k_TGD = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THD, k_TGD))
    q_out, k_out = q_THD.new_empty(q_THD.shape), k_TGD.new_empty(k_TGD.shape)
    code = type_code("rope", q_THD)
    if q_out.numel() + k_out.numel():
        library.call(
            "rope",
            *(q_THD, k_TGD, positions_T.contiguous(), frequencies.float().contiguous(), q_out, k_out),
            *(q_THD.shape[0], q_THD.shape[1], k_TGD.shape[1], frequencies.numel()),
            *(q_THD.stride(0), q_THD.stride(1), k_TGD.stride(0), k_TGD.stride(1)),
            *(direction, code),
        )
    return q_out, k_out
