"""The shipped CUDA sources against the references: on the CPU in three thread orders, and on a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from paralign.engine.kernels import adamw, rms_norm, rope, swiglu, vocab
from paralign.engine.kernels.library import KernelLibrary

from .conftest import Runner, copy_as_it_lies

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to one rounding of the element type, and up to the order of an fp32 sum."""
    assert actual.dtype == expected.dtype
    step = torch.finfo(actual.dtype).eps
    scale = expected.double().abs().max().clamp(min=1e-30)
    error = (actual.double() - expected.double()).abs()
    allowed = step * expected.double().abs() + max(step / 64, 4e-7) * scale
    assert bool((error <= allowed).all()), f"{(error / scale).max().item():.1e} of the largest entry"


def shifted(x: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


def test_a_gpu_is_given_tensors_as_they_lie() -> None:
    """As strided and as misaligned as the CPU is given them."""
    strided = rand(4, 6, dtype=torch.float32, seed=1).t()[1:]
    for x in (shifted(rand(3, 4, dtype=torch.bfloat16, seed=0)), strided, torch.empty(0, 8)):
        there = copy_as_it_lies(x, torch.device("cpu"))
        assert torch.equal(there, x)
        assert there.stride() == x.stride()
        if x.numel():
            assert there.data_ptr() % 16 == x.data_ptr() % 16
            assert there.data_ptr() != x.data_ptr()


# Packed and odd sizes, one row, more packs than threads keep, a length that no pack divides, no row; rows of a head,
# more than all blocks take at once, and rows of one to five warps.
@pytest.mark.parametrize(
    ("rows", "hidden", "dtype"),
    [(5, 256, dtype) for dtype in TYPES]
    + [(1, 9, torch.bfloat16), (3, 1001, torch.float32), (2, 17408, torch.bfloat16), (0, 64, torch.float32)]
    + [(rows, 128, torch.bfloat16) for rows in (64, 450)]
    + [
        (100, 24, torch.float32),
        (7, 1024, torch.bfloat16),
        (5, 1032, torch.bfloat16),
        (3, 5120, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(run: Runner, rows: int, hidden: int, dtype: torch.dtype, with_residual: bool) -> None:
    x, dy, dsum = (rand(rows, hidden, dtype=dtype, seed=s) for s in range(3))
    residual = rand(rows, hidden, dtype=dtype, seed=3) if with_residual else None
    weight = rand(hidden, dtype=dtype, seed=4)
    normed, total, rstd = run(rms_norm.launch_forward, x, residual, weight, 1e-5)
    if residual is None:
        expected = rms_norm.rms_norm_ref(x, weight, 1e-5)
    else:
        expected, expected_total = rms_norm.add_rms_norm_ref(x, residual, weight, 1e-5)
        assert torch.equal(total, expected_total)
    more = dsum if with_residual else None
    gradients = run(rms_norm.launch_backward, total, weight, rstd, dy, more)
    if rows == 0:
        assert normed.numel() == gradients[0].numel() == 0
        assert not gradients[1].any()
        return
    assert_close(normed, expected)
    for actual, wanted in zip(gradients, rms_norm._backward(total, weight, rstd, dy, more), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("rows", "hidden", "processors", "blocks"),
    [
        (2048, 8192, 132, 132),  # fewer than 16 rows each, but every multiprocessor has one
        (3200, 8192, 132, 200),  # 16 rows each
        (2**20, 8192, 132, 132 * 7),  # as many as run at once: here shared memory bounds them
        (2**20, 128, 132, 132 * 7),
        (100, 128, 132, 2),  # 64 rows at once
        (1, 8192, 132, 1),
    ],
)
def test_blocks_of_the_backward_pass(
    cpu_library: KernelLibrary, rows: int, hidden: int, processors: int, blocks: int
) -> None:
    x = torch.empty(8, dtype=torch.bfloat16)
    stand_in = ctypes.CDLL(str(cpu_library.path))
    stand_in.on_cpu_processors(processors)
    arguments = (x, x, x, None, x, rows, hidden, rms_norm.type_code("rms_norm", x))
    assert cpu_library.ask("rms_norm_backward_blocks", *arguments) == blocks
    stand_in.on_cpu_processors(1)


def test_every_thread_has_work(cpu_library: KernelLibrary) -> None:
    """Heads of 128 in bf16 are 16 packs, of which a thread takes four in RMSNorm, and two of each half in RoPE."""
    stand_in = ctypes.CDLL(str(cpu_library.path))
    x, weight = torch.ones(128, 128).bfloat16(), torch.ones(128).bfloat16()
    rstd = rms_norm.launch_forward(cpu_library, x, None, weight, 1e-5)[2]
    assert stand_in.on_cpu_threads() == 128 * 16 // 4
    rms_norm.launch_backward(cpu_library, x, weight, rstd, x, None)
    assert stand_in.on_cpu_threads() == 128 * 16 // 4
    for heads in ((16, 2), (8, 1), (32, 8)):
        q, k = (torch.ones(8, n, 128).bfloat16() for n in heads)
        rope.launch(cpu_library, q, k, torch.arange(8), torch.ones(64), 1.0)
        assert stand_in.on_cpu_threads() == 8 * sum(heads) * 8 // 2


def test_rms_norm_of_misaligned_and_strided_rows(run: Runner) -> None:
    x, weight = rand(4, 64, dtype=torch.bfloat16, seed=0), rand(64, dtype=torch.bfloat16, seed=1)
    expected = rms_norm.rms_norm_ref(x, weight, 1e-5)
    assert_close(run(rms_norm.launch_forward, shifted(x), None, shifted(weight), 1e-5)[0], expected)
    strided = x.t().contiguous().t()
    assert_close(run(rms_norm.launch_forward, strided, None, weight, 1e-5)[0], expected)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 512), dtype) for dtype in TYPES]
    + [((1, 2), torch.bfloat16), ((3, 1, 2 * 333), torch.float32), ((0, 16), torch.float32)],
)
@pytest.mark.parametrize("scale", [1.0, 30.0])  # where the sigmoid saturates
def test_swiglu(run: Runner, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    gate_up = rand(*shape, dtype=dtype, seed=0, scale=scale)
    dout = rand(*shape[:-1], shape[-1] // 2, dtype=dtype, seed=1)
    out = run(swiglu.launch_forward, gate_up)
    gradient = run(swiglu.launch_backward, gate_up, dout)
    assert out.shape == dout.shape
    if gate_up.numel():
        assert_close(out, swiglu.swiglu_ref(gate_up))
        assert_close(gradient, swiglu._backward(gate_up, dout))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [16, 6])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_rope_of_a_fused_projection(run: Runner, dtype: torch.dtype, channels: int, direction: float) -> None:
    """Queries and keys are slices of one buffer; positions restart inside the pack and reach far."""
    fused = rand(5, 2, 4, channels, dtype=dtype, seed=0)  # rows, groups, (two queries, key, value), channels
    q, k = fused[:, :, :2].reshape(5, 4, channels), fused[:, :, 2]
    assert not k.is_contiguous()
    positions = torch.tensor([0, 1, 131071, 0, 7])
    frequencies = 5e5 ** -(torch.arange(0, channels, 2).float() / channels)
    actual = run(rope.launch, q, k, positions, frequencies, direction)
    for x, wanted in zip(actual, rope._rope(q, k, positions, frequencies, direction), strict=True):
        assert x.is_contiguous()
        assert_close(x, wanted)


@pytest.mark.parametrize(
    ("rows", "q_heads", "k_heads", "channels", "dtype"),
    [
        (9, 16, 2, 128, torch.bfloat16),
        (9, 8, 1, 128, torch.float16),
        (3, 20, 20, 128, torch.float32),
        (2, 5, 1, 254, torch.float32),
        (70, 3, 0, 10, torch.bfloat16),
    ],
    ids=["four rows a block", "eight", "two passes", "single elements", "64 rows, no key"],
)
def test_rope_of_several_rows_a_block(
    run: Runner, rows: int, q_heads: int, k_heads: int, channels: int, dtype: torch.dtype
) -> None:
    q, k = (rand(rows, heads, channels, dtype=dtype, seed=heads) for heads in (q_heads, k_heads))
    positions, frequencies = torch.arange(rows) * 7 % 5, torch.rand(channels // 2)
    actual = run(rope.launch, q, k, positions, frequencies, 1.0)
    for x, wanted in zip(actual, rope.rope_ref(q, k, positions, frequencies), strict=True):
        assert x.shape == wanted.shape
        if x.numel():
            assert_close(x, wanted)


def test_misaligned_and_strided_inputs_give_the_same(run: Runner) -> None:
    """Addresses off by one element, rows and channels that do not lie side by side."""
    gate_up, dout = rand(3, 64, dtype=torch.bfloat16, seed=0), rand(3, 32, dtype=torch.bfloat16, seed=1)
    for change in (shifted, lambda x: x.t().contiguous().t()):
        assert_close(run(swiglu.launch_forward, change(gate_up)), swiglu.swiglu_ref(gate_up))
        gradient = run(swiglu.launch_backward, change(gate_up), change(dout))
        assert_close(gradient, swiglu._backward(gate_up, dout))
    q, k = rand(3, 4, 16, dtype=torch.bfloat16, seed=2), rand(3, 1, 16, dtype=torch.bfloat16, seed=3)
    positions, frequencies = torch.tensor([5, 6, 0]), torch.rand(8)
    for change in (shifted, lambda x: x.mT.contiguous().mT):
        turned = run(rope.launch, change(q), change(k), positions, frequencies, 1.0)
        for x, wanted in zip(turned, rope.rope_ref(q, k, positions, frequencies), strict=True):
            assert_close(x, wanted)
    logits, labels, none = (
        rand(3, 64, dtype=torch.bfloat16, seed=4),
        torch.tensor([0, 9, 63]),
        torch.empty(3, 0),
    )
    partials = run(vocab.launch_partials, shifted(logits), labels, none.long(), none, 0)
    torch.testing.assert_close(partials, vocab.vocab_partials(logits, labels, none.long(), none, 0))


def test_rope_of_no_row(run: Runner) -> None:
    nothing = torch.empty(0, 2, 8)
    out = run(rope.launch, nothing, nothing, torch.empty(0, dtype=torch.int64), torch.ones(4), 1.0)
    assert out[0].shape == (0, 2, 8)


def _choices(rows: int, vocabulary: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    indices = torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(rows)])
    return indices, torch.randn(rows, k, generator=generator).log_softmax(-1) if k else torch.empty(rows, 0)


@pytest.mark.parametrize(
    ("columns", "k", "dtype", "scale"),
    [(320, 7, dtype, 3.0) for dtype in TYPES]
    + [
        (37, 37, torch.float32, 1.0),
        (2500, 300, torch.bfloat16, 3.0),
        (1, 1, torch.float32, 1.0),
        (100, 0, torch.bfloat16, 1.0),
        (64, 5, torch.float32, 1e4),  # huge logits: one token has all the probability
        (64, 5, torch.float32, 1e-6),  # tiny ones: all the same
    ],
)
def test_vocabulary_sums_and_gradient(
    run: Runner, columns: int, k: int, dtype: torch.dtype, scale: float
) -> None:
    """One shard of three: labels and chosen indices lie in it and in the others."""
    rows, first = 4, columns
    logits = rand(rows, columns, dtype=dtype, seed=0, scale=scale)
    labels = torch.tensor([0, columns, 2 * columns - 1, 3 * columns - 1])  # before, its edges, after
    chosen, chosen_logprob = _choices(rows, 3 * columns, k)
    actual = run(vocab.launch_partials, logits, labels, chosen, chosen_logprob, first)
    expected = vocab.vocab_partials(logits, labels, chosen, chosen_logprob, first)
    assert torch.equal(actual[:, [0, 3, 4]], expected[:, [0, 3, 4]])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    values = rand(rows, vocab.COLUMNS, dtype=torch.float32, seed=1)
    values[:, 0] = logits.float().logsumexp(-1) + 1.0
    values[:, 5] = logits.float().amax(-1)
    gradient, wanted = logits.clone(), logits.clone()
    run(vocab.launch_gradient, gradient, labels, values, chosen, chosen_logprob, first)
    vocab.vocab_gradient_(wanted, labels, values, chosen, chosen_logprob, first)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, wanted, rtol=max(2 * step, 1e-5), atol=1e-5 + step * scale / 8)


def test_vocabulary_of_no_row(run: Runner) -> None:
    logits, labels, none = torch.empty(0, 8), torch.empty(0, dtype=torch.int64), torch.empty(0, 0)
    assert run(vocab.launch_partials, logits, labels, none.long(), none, 0).shape == (0, vocab.COLUMNS)
    run(vocab.launch_gradient, logits, labels, torch.empty(0, vocab.COLUMNS), none.long(), none, 0)


def test_more_chosen_than_shared_memory_holds_is_an_error(cpu_library: KernelLibrary) -> None:
    logits = torch.zeros(1, 8)
    chosen, logprob = torch.zeros(1, 60000, dtype=torch.int64), torch.zeros(1, 60000)
    message = r"kernel vocab_gradient: shared memory; called with float32 of shape \(1, 8\), stride \(8, 1\)"
    with pytest.raises(RuntimeError, match=message):
        vocab.launch_gradient(
            cpu_library, logits, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 7), chosen, logprob, 0
        )


@pytest.mark.parametrize("low", [None, *TYPES])
@pytest.mark.parametrize("count", [4096 + 3, 1, 0])
def test_adamw(run: Runner, low: torch.dtype | None, count: int) -> None:
    param, grad, exp_avg = (rand(count, dtype=torch.float32, seed=s) for s in range(3))
    exp_avg_sq = rand(count, dtype=torch.float32, seed=3).square()
    ours = [param, exp_avg, exp_avg_sq, None if low is None else torch.full((count,), torch.nan, dtype=low)]
    theirs = [None if x is None else x.clone() for x in ours]
    factor = torch.tensor(0.5)
    numbers = (1e-2, 0.9, 0.99, 1e-8, 0.1, 1 - 0.9**3, 1 - 0.99**3)
    run(adamw.launch, ours[0], grad, *ours[1:], factor, *numbers)
    adamw._adamw(theirs[0], grad, *theirs[1:], factor, *numbers)
    for actual, wanted in zip(ours, theirs, strict=True):
        if actual is not None and wanted is not None:
            torch.testing.assert_close(
                actual, wanted, rtol=max(1e-6, torch.finfo(actual.dtype).eps), atol=1e-6
            )


def test_squared_sum(run: Runner) -> None:
    x = rand(5001, dtype=torch.float32, seed=0)
    for vectors in ([x], [x[1:]], [x[:1]], [x[:0]], [x, x[:7], x[:0], x[3:]]):
        actual = run(adamw.launch_squared_sum, *vectors, blocks=3)
        wanted = torch.stack([vector.double().square().sum() for vector in vectors]).sum()
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0)


def test_an_element_type_that_no_kernel_serves(cpu_library: KernelLibrary) -> None:
    x = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"swiglu: float64 of shape \(2, 4\), stride \(4, 1\); kernels serve"
    ):
        swiglu.launch_forward(cpu_library, x)
    with pytest.raises(RuntimeError, match="an element type that no kernel was built for"):
        cpu_library.call("swiglu_forward", x, x, 2, 2, 9)


def test_tensors_of_two_devices(cpu_library: KernelLibrary) -> None:
    gate_up, elsewhere = torch.zeros(2, 8), torch.zeros(2, 4, device="meta")
    with pytest.raises(ValueError, match=r"swiglu_backward: tensors of one device; .* \(4, 1\) on meta, "):
        swiglu.launch_backward(cpu_library, gate_up, elsewhere)
