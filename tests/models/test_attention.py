"""Packed attention: who sees whom, rotary tables, keys that several segments share."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from paralign.engine.batch import Head
from paralign.engine.data.answers import Answer, AnswerLayout, Group
from paralign.engine.data.pack import pack_chats, pack_groups
from paralign.models import arch_from_hf
from paralign.models import attention as module
from paralign.models.attention import (
    PackedAttention,
    alibi_attention,
    apply_rotary,
    choose_kernel,
    flash_attention,
    inverse_frequencies,
    rotary_table,
    rotate,
    sdpa_attention,
    varlen_attention,
)
from paralign.models.errors import RecipeError
from paralign.models.segments import Segments

LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_table_equals_transformers(scaled: bool) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_parameters=LLAMA_31 if scaled else {"rope_type": "default", "rope_theta": 500000.0},
    )
    arch = arch_from_hf(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    positions = torch.tensor([0, 1, 2, 3, 1000, 8191, 8192, 100_000])
    cos, sin = rotary_table(positions, inverse_frequencies(arch), torch.float32)
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    assert torch.equal(cos[:, 0, 0], expected_cos[0])
    assert torch.equal(sin[:, 0, 0], expected_sin[0])

    x = torch.randn(8, 1, 2, 128)
    expected, _ = apply_rotary_pos_emb(*(x[:, 0].transpose(0, 1)[None],) * 2, expected_cos, expected_sin)
    assert torch.equal(apply_rotary(x, cos, sin)[:, 0], expected[0].transpose(0, 1))


def test_a_segment_sees_itself_and_nothing_else() -> None:
    torch.manual_seed(0)
    samples = [([1] * length, [True] * length) for length in (5, 1, 9)]
    segments = pack_chats(samples, 20, torch.device("cpu")).segments
    q, k, v = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    out = sdpa_attention(q, k, v, segments, 0.3)
    for start, end in ((0, 5), (5, 6), (6, 15)):
        changed_k, changed_v = torch.randn_like(k), torch.randn_like(v)
        changed_k[start:end], changed_v[start:end] = k[start:end], v[start:end]
        again = sdpa_attention(q, changed_k, changed_v, segments, 0.3)
        assert torch.equal(out[start:end], again[start:end])
    scores = (q[6:15, 3] @ k[6:15, 1].t() * 0.3).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out[6:15, 3], scores.softmax(-1) @ v[6:15, 1])


def test_shared_keys_equal_copied_keys() -> None:
    """[p c | p_last r] with p's keys gathered gives the rows of [p c] and [p r]."""
    torch.manual_seed(0)
    p, c, r = 4, 3, 2
    q, k, v = (
        torch.randn(p + c + 1 + r, 2, 8),
        torch.randn(p + c + 1 + r, 2, 8),
        torch.randn(p + c + 1 + r, 2, 8),
    )
    key_rows = [*range(p + c), *range(p - 1), *range(p + c, p + c + 1 + r)]
    segments = Segments(
        cu_seqlens_q=torch.tensor([0, p + c, p + c + 1 + r]),
        bounds=((0, p + c, 0, p + c), (p + c, p + c + 1 + r, p + c, p + c + p + r)),
    )
    out = sdpa_attention(q, k[key_rows], v[key_rows], segments, 1.0)
    rows = [*range(p - 1), *range(p + c, p + c + 1 + r)]  # the second response behind its own prompt
    plain = Segments(bounds=((0, len(rows), 0, len(rows)),))
    expected = sdpa_attention(q[rows], k[rows], v[rows], plain, 1.0)
    torch.testing.assert_close(out[p + c :], expected[p - 1 :])


GPU, CPU = torch.device("cuda"), torch.device("cpu")


def gradients_of_shared_keys(
    device: torch.device, dtype: torch.dtype, n_answers: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What reaches the keys (T, 2, 8) of two prompts, one with two answers, one with many, through PackedAttention.

    Returns:
        It; what each key got (U, 2, 8); and the row of each key.
    """
    layout = AnswerLayout(frozenset(), Head.LM, share_prefix=True)
    answers = [Answer(np.arange(3), np.ones(3, np.float32), i) for i in range(n_answers)]
    groups = [Group(np.arange(7), tuple(answers[:n])) for n in (2, n_answers)]
    segments = pack_groups(groups, 256, device, layout).segments
    assert segments.kv_index is not None
    above = torch.randn(len(segments.kv_index), 2, 8, generator=torch.Generator().manual_seed(1))
    above = above.to(device, dtype)
    kernel = lambda q, k, v, *_: q + (k * above).sum() + (v * above).sum()  # noqa: E731
    attention = PackedAttention(SimpleNamespace(kv_channels=8), 1, None, "self", rotate=rotate, kernel=kernel)
    query, key, value = (torch.zeros(256, 1, 2, 8, device=device, dtype=dtype) for _ in range(3))
    out = attention(query, key.requires_grad_(), value.requires_grad_(), packed_seq_params=segments)
    found = torch.autograd.grad(out[0, 0, 0], (key, value))
    assert torch.equal(*found)
    return found[0][:, 0], above, segments.kv_index


def in_order(above: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradients of a row's keys, added one by one in a type."""
    sums = above.new_zeros(256, *above.shape[1:], dtype=dtype)
    for key, row in enumerate(rows.tolist()):
        sums[row] += above[key]
    return sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_shared_keys_are_added_in_order_and_rounded_once(dtype: torch.dtype) -> None:
    found, above, rows = gradients_of_shared_keys(CPU, dtype)
    assert torch.equal(found, in_order(above, rows, torch.promote_types(dtype, torch.float32)).to(dtype))
    if dtype == torch.bfloat16:
        exact = in_order(above, rows, torch.float64)
        error, theirs = ((x - exact).abs() for x in (found, in_order(above, rows, dtype)))
        assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()
        assert error.max() < theirs.max() / 2


def test_gradients_of_shared_keys_meet_no_atomics() -> None:
    """On CUDA `index_add` and its like add in whatever order threads come, in the type that they are given."""
    with OperationsSeen() as seen:
        gradients_of_shared_keys(CPU, torch.bfloat16)
    assert "index_select.default" in seen.names
    assert not [name for name in seen.names if name.startswith(("index_add", "index_put", "scatter"))]


class OperationsSeen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.names.append(function.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.gpu
def test_gradients_of_shared_keys_are_the_same_in_every_run() -> None:
    first, above, rows = gradients_of_shared_keys(GPU, torch.bfloat16)
    assert torch.equal(first, in_order(above, rows, torch.float32).bfloat16())
    for _ in range(20):
        assert torch.equal(gradients_of_shared_keys(GPU, torch.bfloat16)[0], first)


@pytest.mark.parametrize(
    ("device", "dtype", "alibi", "installed", "expected"),
    [
        (GPU, torch.bfloat16, False, True, flash_attention),
        (GPU, torch.bfloat16, False, False, varlen_attention),
        (GPU, torch.bfloat16, True, True, flash_attention),
        (GPU, torch.bfloat16, True, False, alibi_attention),
        (GPU, torch.float32, False, True, sdpa_attention),
        (CPU, torch.float32, False, True, sdpa_attention),
        (CPU, torch.float32, True, False, alibi_attention),
    ],
)
def test_the_fastest_kernel_that_serves(
    device: torch.device,
    dtype: torch.dtype,
    alibi: bool,
    installed: bool,
    expected: module.Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "why_no_flash_attn", lambda: "" if installed else "absent")
    assert choose_kernel(device, dtype, alibi=alibi) is expected


@pytest.mark.parametrize(
    ("device", "dtype", "alibi", "backend", "why"),
    [
        (CPU, torch.bfloat16, False, "flash", "runs on GPUs in bf16"),
        (GPU, torch.float32, False, "varlen", "float32 on cuda"),
        (GPU, torch.bfloat16, False, "flash", r"pip install .paralign\[gpu\]"),
    ],
)
def test_a_kernel_that_does_not_serve_is_refused(
    device: torch.device,
    dtype: torch.dtype,
    alibi: bool,
    backend: module.AttentionBackend,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "why_no_flash_attn", lambda: "absent")
    with pytest.raises(RecipeError, match=f"model.attention_backend: {backend} .*{why}.*auto"):
        choose_kernel(device, dtype, alibi=alibi, backend=backend)


def written_out(q, k, v, cu_q, cu_k, scale, slopes=None):
    """Causal attention from the end of each segment, head by head; query heads share the keys of their group."""
    out = torch.empty_like(q)
    groups = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        rows, keys = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)[None]
        for head in range(q.shape[1]):
            scores = q[a:b, head] @ k[c:d, head // groups].t() * scale
            if slopes is not None:
                scores = scores - slopes[head] * (rows - keys).abs()
            weights = scores.masked_fill(keys > rows, -torch.inf).softmax(-1)
            out[a:b, head] = weights @ v[c:d, head // groups]
    return out


def varlen_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert window_size == (-1, 0)
    return written_out(query, key, value, cu_seq_q, cu_seq_k, scale)


def varlen_of_torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert key.shape[1] == value.shape[1] == 2 or not enable_gqa
    assert window_size == (-1, 0)
    return written_out(query, key, value, cu_seq_q, cu_seq_k, scale)


@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "as many keys"])
@pytest.mark.parametrize("theirs", [varlen_of_torch_2_11, varlen_of_torch_2_12])
def test_grouped_keys_are_copied_only_for_a_torch_that_takes_no_groups(
    theirs: Callable[..., torch.Tensor], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's function is replaced by its documented meaning, which needs no GPU; the call fits the one installed."""
    torch.manual_seed(0)
    segments = pack_chats([([1] * n, [True] * n) for n in (5, 9)], 14, CPU).segments
    leaves = [torch.randn(14, h, 8, requires_grad=True) for h in (4, heads, heads)]
    called = mock.Mock(wraps=theirs)
    called.__signature__ = inspect.signature(theirs)
    installed = inspect.signature(varlen.varlen_attn)
    monkeypatch.setattr(varlen, "varlen_attn", called)
    out = varlen_attention(*leaves, segments, 0.3)
    if theirs.__name__ == "varlen_of_torch_2_11" or "enable_gqa" in installed.parameters:
        installed.bind(*called.call_args.args, **called.call_args.kwargs)
    copies = theirs is varlen_of_torch_2_11 and heads == 2
    assert called.call_args.args[1].shape[1] == (4 if copies else heads)
    expected = sdpa_attention(*leaves, segments, 0.3)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    gradients = (torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True) for x in (out, expected))
    torch.testing.assert_close(*gradients)


def test_flash_attn_is_called_with_our_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is replaced by its documented meaning, written out; the real one needs a GPU."""
    torch.manual_seed(0)
    segments = pack_chats([([1] * n, [True] * n) for n in (5, 9)], 14, CPU).segments
    q, k, v = torch.randn(14, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)

    def documented(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, alibi_slopes, deterministic):
        assert causal
        assert not deterministic
        assert (max_q, max_k) == (9, 9)
        return written_out(q, k, v, cu_q, cu_k, softmax_scale, alibi_slopes)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=documented))
    torch.testing.assert_close(
        flash_attention(q, k, v, segments, 0.3), sdpa_attention(q, k, v, segments, 0.3)
    )
    segments.alibi_slopes_H = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    torch.testing.assert_close(
        flash_attention(q, k, v, segments, 0.3), alibi_attention(q, k, v, segments, 0.3)
    )


def test_flash_attn_keeps_no_slice_of_a_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves values as they are given: a slice would hold the queries and keys beside it, which were turned."""
    kept: list[int] = []

    def look(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sizes: object, **options: object
    ) -> torch.Tensor:
        kept.append(v.untyped_storage().nbytes())
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=look))
    segments = pack_chats([([1] * 14, [True] * 14)], 14, CPU).segments
    value = torch.randn(14, 8, 8)[:, 6:]
    flash_attention(torch.randn(14, 4, 8), torch.randn(14, 2, 8), value, segments, 0.3)
    assert kept == [value.nbytes]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [varlen_attention, flash_attention])
@pytest.mark.parametrize("shared", [False, True])
def test_kernels_of_the_gpu_equal_sdpa(kernel: module.Kernel, shared: bool) -> None:
    """bf16 outputs and gradients are as near to fp32 as torch's own attention is, times two."""
    if kernel is flash_attention:
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    if shared:
        p, c, r = 300, 200, 77
        rows, keys = [0, p + c, p + c + 1 + r], [0, p + c, p + c + p + r]
        index = [*range(p + c), *range(p - 1), *range(p + c, p + c + 1 + r)]
    else:
        rows = keys = [0, 500, 501, 640]
        index = list(range(640))
    q, k, v, gradient = (torch.randn(rows[-1], heads, 64, device=GPU) for heads in (8, 2, 2, 8))
    segments = Segments(
        cu_seqlens_q=torch.tensor(rows, dtype=torch.int32, device=GPU),
        cu_seqlens_kv=torch.tensor(keys, dtype=torch.int32, device=GPU),
        max_seqlen_q=max(b - a for a, b in pairwise(rows)),
        max_seqlen_kv=max(b - a for a, b in pairwise(keys)),
        bounds=tuple((a, b, c, d) for (a, b), (c, d) in zip(pairwise(rows), pairwise(keys))),
    )

    def run(attend: module.Kernel, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(leaves[0], leaves[1][index], leaves[2][index], segments, 0.125)
        out.backward(gradient.to(dtype))
        return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    exact, theirs = run(sdpa_attention, torch.float32), run(sdpa_attention, torch.bfloat16)
    for ours, reference, other in zip(run(kernel, torch.bfloat16), exact, theirs, strict=True):
        allowed = 2 * (other.float() - reference).abs().max()
        assert (ours.float() - reference).abs().max() <= allowed
