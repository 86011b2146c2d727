"""Packed core attention: positions (rotary or ALiBi), key gather, then the kernel in use behind one name.

Shape suffixes: T query rows, U keys, H query heads of this rank, G key heads of this rank, D channels a head.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import Arch
from .errors import RecipeError
from .mcore import MegatronModule
from .segments import Segments

AttentionBackend = Literal["auto", "flash", "varlen", "sdpa"]
Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]
# Queries (T, H, D), keys (T, G, D), positions (T,) and frequencies (D/2,) to queries and keys turned.
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def inverse_frequencies(arch: Arch) -> Tensor:
    """Rotary frequencies θ^(−2i/D), i = 0 … D/2 − 1 (RoFormer, arXiv 2104.09864); float32 (D/2,).

    With `rope_scaling` the wavelengths are stretched as Llama 3.1 does: those longer than
    `original / low_freq_factor` by `factor`, those shorter than `original / high_freq_factor` not at all,
    those between by a linear blend of the two.
    """
    channels = torch.arange(0, arch.kv_channels, 2, dtype=torch.int64).float()
    frequencies = 1.0 / arch.rope_theta ** (channels / arch.kv_channels)
    scaling = arch.rope_scaling
    if scaling is None:
        return frequencies
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(
        wavelengths > original / scaling.low_freq_factor, frequencies / scaling.factor, blend
    )
    return torch.where(wavelengths < original / scaling.high_freq_factor, frequencies, stretched)


def rotary_table(positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for each row, (T, 1, 1, D), halves repeated; angles in float32, then cast to `dtype`."""
    angles = torch.outer(positions_T.float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D/2) of x (T, 1, heads, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotate(q_THD: Tensor, k_TGD: Tensor, positions_T: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Both turned, in their own type, as transformers does it."""
    cos, sin = (table[:, 0] for table in rotary_table(positions_T, frequencies, q_THD.dtype))
    return apply_rotary(q_THD, cos, sin), apply_rotary(k_TGD, cos, sin)


def alibi_slopes(num_heads: int) -> Tensor:
    """Slope of each head (ALiBi, arXiv 2108.12409, section 3), float32 (num_heads,).

    For n heads, n a power of two: 2^(−8i/n), i = 1 … n. Otherwise those of the next smaller power, then every
    other slope of twice that power, as the paper's authors' code has it and Baichuan2-13B was trained with.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-4 * i / power) for i in range(1, 2 * power + 1, 2)]
    return torch.tensor(slopes + between[: num_heads - power], dtype=torch.float32)


def sdpa_attention(q_THD: Tensor, k_UGD: Tensor, v_UGD: Tensor, segments: Segments, scale: float) -> Tensor:
    """torch's scaled-dot-product attention, one call a segment; (T, H, D). The CPU path.

    The padding tail is computed too: in a pack without samples every parameter must still receive a gradient
    of zero, or an overlapped gradient reduction would wait for it.
    """
    grouped = q_THD.shape[1] != k_UGD.shape[1]
    outputs = []
    for row, row_end, key, key_end in segments.bounds:
        n_rows, n_keys = row_end - row, key_end - key
        mask = None
        if n_rows != n_keys:  # shared keys: the last query row sees the last key
            mask = torch.ones(n_rows, n_keys, dtype=torch.bool, device=q_THD.device).tril(n_keys - n_rows)
        q, k, v = (
            x.transpose(0, 1)[None] for x in (q_THD[row:row_end], k_UGD[key:key_end], v_UGD[key:key_end])
        )
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def varlen_attention(q_THD: Tensor, k_UGD: Tensor, v_UGD: Tensor, segments: Segments, scale: float) -> Tensor:
    """torch's variable-length flash attention, one launch a pack; (T, H, D). CUDA, fp16 and bf16 only."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if (groups := q_THD.shape[1] // k_UGD.shape[1]) > 1:
        if _takes_groups(varlen_attn):
            options["enable_gqa"] = True
        else:  # torch 2.11
            k_UGD, v_UGD = k_UGD.repeat_interleave(groups, dim=1), v_UGD.repeat_interleave(groups, dim=1)
    out = varlen_attn(
        q_THD.contiguous(),
        k_UGD.contiguous(),
        v_UGD.contiguous(),
        segments.cu_seqlens_q,
        segments.cu_seqlens_kv,
        segments.max_seqlen_q,
        segments.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),
        **options,
    )
    assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
    return out


@functools.cache
def _takes_groups(varlen_attn: Callable[..., Any]) -> bool:
    """Whether this torch's attention reads fewer key heads than query heads without copies of them."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def flash_attention(q_THD: Tensor, k_UGD: Tensor, v_UGD: Tensor, segments: Segments, scale: float) -> Tensor:
    """The flash-attn package, one launch a pack; (T, H, D). CUDA, fp16 and bf16 only; takes ALiBi's slopes.

    Causal from the end: the last row of a segment sees its last key, as shared keys need it.
    """
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q_THD,
        k_UGD,
        v_UGD.contiguous(),  # a slice would keep the whole projection until the backward pass
        segments.cu_seqlens_q,
        segments.cu_seqlens_kv,
        segments.max_seqlen_q,
        segments.max_seqlen_kv,
        softmax_scale=scale,
        causal=True,
        alibi_slopes=segments.alibi_slopes_H,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


def alibi_attention(q_THD: Tensor, k_UGD: Tensor, v_UGD: Tensor, segments: Segments, scale: float) -> Tensor:
    """torch's scaled-dot-product attention with slope · (key position − row position) added, a segment a call.

    The slopes are `segments.alibi_slopes_H`. torch's variable-length attention takes none, so this serves CUDA
    too where flash-attn is not installed; the bias costs H · l² elements for a segment of l rows.
    """
    assert segments.alibi_slopes_H is not None
    positions_U = segments.positions_T
    if segments.kv_index is not None:
        positions_U = positions_U.index_select(0, segments.kv_index)
    slopes = segments.alibi_slopes_H[:, None, None]
    outputs = []
    for row, row_end, key, key_end in segments.bounds:
        distance = positions_U[None, key:key_end] - segments.positions_T[row:row_end, None]
        bias = (slopes * distance).masked_fill(distance > 0, -torch.inf).to(q_THD.dtype)
        q, k, v = (
            x.transpose(0, 1)[None] for x in (q_THD[row:row_end], k_UGD[key:key_end], v_UGD[key:key_end])
        )
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@functools.cache
def why_no_flash_attn() -> str:
    """Why the flash-attn package cannot be used, as where it was built for another torch; empty if it can."""
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        return str(error)
    return ""


def choose_kernel(
    device: torch.device, dtype: torch.dtype, *, alibi: bool = False, backend: AttentionBackend = "auto"
) -> Kernel:
    """The kernel that a recipe names, or with `auto` the first that serves: flash-attn, torch's varlen, SDPA.

    Raises:
        RecipeError: the kernel named does not serve this device, dtype or kind of positions.
    """
    half_on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    per_segment = alibi_attention if alibi else sdpa_attention
    if backend == "sdpa":
        return per_segment
    if backend == "auto":
        if half_on_gpu and not why_no_flash_attn():
            return flash_attention
        return varlen_attention if half_on_gpu and not alibi else per_segment
    for wrong, why in (
        (not half_on_gpu, f"runs on GPUs in bf16 or fp16, and this is {dtype} on {device.type}"),
        (
            backend == "flash" and bool(why_no_flash_attn()),
            f"cannot be used ({why_no_flash_attn()}): pip install 'paralign[gpu]'",
        ),
    ):
        if wrong:
            raise RecipeError(f"model.attention_backend: {backend} {why}; or set it to auto")
    assert not (backend == "varlen" and alibi), "a recipe is checked for this (engine/backends)"
    return flash_attention if backend == "flash" else varlen_attention


class _KeysOfSegments(torch.autograd.Function):
    """Rows (T, G, D) as keys (U, G, D), some of them in several segments.

    The gradient of a row is the sum of those of its keys, in the order of the segments, in fp32, rounded once.
    torch's own adds in the rows' type, and on CUDA in an order that differs from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_TGD: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return x_TGD.index_select(0, segments.kv_index)

    @staticmethod
    def backward(ctx: Any, grad_UGD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        segments: Segments = ctx.segments
        own = [grad_UGD[end - (row_end - row) : end] for row, row_end, _, end in segments.bounds]
        sums_TGD = torch.cat(own)
        wide = sums_TGD if sums_TGD.dtype == torch.float64 else sums_TGD.float()
        for row, key, n in segments.shared:
            wide[row : row + n].add_(grad_UGD[key : key + n])
        return wide.to(grad_UGD.dtype), None


class PackedAttention(MegatronModule):
    """Megatron's `core_attention` for packs: causal inside each segment, positions as `Segments` says."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        rotate: Rotate,
        kernel: Kernel,
    ) -> None:
        super().__init__(config=config)
        self.rotate, self.kernel = rotate, kernel
        del layer_number, attn_mask_type, attention_type, cp_comm_type, pg_collection
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> Tensor:
        """query (T, 1, H, D), key and value (T, 1, G, D) to (T, 1, H·D)."""
        del attention_mask, attn_mask_type, attention_bias
        assert packed_seq_params is not None, "every batch is a pack"
        segments = packed_seq_params
        q, k, v = query[:, 0], key[:, 0], value[:, 0]
        if segments.rope is not None:
            q, k = self.rotate(q, k, segments.positions_T, segments.rope)
        if segments.kv_index is not None:
            k, v = _KeysOfSegments.apply(k, segments), _KeysOfSegments.apply(v, segments)
        out = self.kernel(q, k, v, segments, self.scale)
        return out.reshape(out.shape[0], 1, -1)
