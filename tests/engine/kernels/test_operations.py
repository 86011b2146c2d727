"""Every operation against its definition, in float64 where derivatives are checked; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paralign.engine.kernels import adamw, rms_norm, rope, swiglu, vocab
from paralign.engine.kernels.adamw import adamw_, clip_factor, squared_sum
from paralign.models.attention import rotate


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


POSITIONS = torch.tensor([0, 1, 2, 0, 1, 0])  # three segments, the last of one row
FREQUENCIES = torch.tensor([1.0, 0.1, 0.01])

DIFFERENTIABLE: dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]] = {
    "rms_norm": (
        lambda x, w: rms_norm.rms_norm(x, w, 1e-5),
        lambda x, w: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w,
        [(3, 1, 5), (5,)],
    ),
    "add_rms_norm": (
        lambda x, r, w: rms_norm.add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: (
            (x + r) / torch.sqrt(((x + r) ** 2).mean(-1, keepdim=True) + 1e-5) * w,
            x + r,
        ),
        [(3, 5), (3, 5), (5,)],
    ),
    "swiglu": (
        swiglu.swiglu,
        lambda x: x[..., :4] / (1 + torch.exp(-x[..., :4])) * x[..., 4:],
        [(3, 8)],
    ),
    "rope": (
        lambda q, k: rope.rope(q, k, POSITIONS.to(q.device), FREQUENCIES.to(q.device)),
        lambda q, k: (_turn(q), _turn(k)),
        [(6, 2, 6), (6, 1, 6)],
    ),
}


def _turn(x: Tensor) -> Tensor:
    """Rotation of complex numbers: channel i is the real part, channel i + D/2 the imaginary part."""
    angle = (POSITIONS.float()[:, None] * FREQUENCIES).double()[:, None]
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_an_operation_equals_an_independent_formula_and_its_derivatives(name: str) -> None:
    operation, formula, shapes = DIFFERENTIABLE[name]
    inputs = [rand(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    actual, expected = operation(*inputs), formula(*inputs)
    # Angles are fp32 on both sides, their cosines are not.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(operation, inputs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_fp32(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """One rounding away from the exact result, not several."""
    operation, formula, shapes = DIFFERENTIABLE[name]
    inputs = [rand(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    actual, expected = operation(*(x.to(device) for x in inputs)), formula(*[x.double() for x in inputs])
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    eps = torch.finfo(dtype).eps
    # Only the sum itself is rounded before it is normalised: that is what the unfused pair would keep.
    slack = 2 if name == "add_rms_norm" else 0.51
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.cpu().double(), y, rtol=slack * eps, atol=1e-5)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_no_row_gives_no_row_and_no_gradient(name: str, device: torch.device) -> None:
    operation, _, shapes = DIFFERENTIABLE[name]
    rowless = [(0, *shape[1:]) if len(shape) > 1 else shape for shape in shapes]
    leaves = [torch.ones(shape, device=device, requires_grad=True) for shape in rowless]
    if name == "rope":
        out = rope.rope(*leaves, POSITIONS[:0].to(device), FREQUENCIES.to(device))
    else:
        out = operation(*leaves)
    outputs = (out,) if isinstance(out, Tensor) else out
    assert [x.numel() for x in outputs] == [0] * len(outputs)
    sum(x.sum() for x in outputs).backward()
    assert not any(x.grad.any() for x in leaves if x.grad is not None)


def test_operators_are_registered_as_torch_wants_them(device: torch.device) -> None:
    """Schema, fake and autograd agree with what runs, eagerly and under torch.compile; strided inputs too."""

    def like(*shape: int, seed: int = 0) -> Tensor:
        return rand(*shape, seed=seed, dtype=torch.float32).to(device)

    x, w = like(3, 8).requires_grad_(), like(8).requires_grad_()
    strided = like(8, 3).t().requires_grad_()
    q, k = like(6, 2, 6).requires_grad_(), like(6, 1, 6)
    fused = like(6, 2, 12)[..., :6].requires_grad_()
    positions, frequencies = POSITIONS.to(device), FREQUENCIES.to(device)
    rstd = rms_norm._normalise(x.detach(), w.detach(), 1e-5)[1]
    labels = torch.tensor([1, 5, 7], device=device)
    chosen = torch.tensor([[0, 3], [1, 2], [6, 7]], device=device)
    chosen_logprob, rows = like(3, 2), like(3, vocab.COLUMNS)
    flat = [like(9, seed=i).abs() for i in range(4)]
    low, one = torch.zeros(9, dtype=torch.bfloat16, device=device), torch.ones((), device=device)
    for operator, arguments in (
        (rms_norm._forward, (x, w, 1e-5)),
        (rms_norm._forward, (strided, w, 1e-5)),
        (rms_norm._add_forward, (x, x.detach() + 1, w, 1e-5)),
        (rms_norm._add_forward, (strided, x.detach(), w, 1e-5)),
        (rms_norm._backward, (x.detach(), w.detach(), rstd, x.detach(), None)),
        (rms_norm._backward, (strided.detach(), w.detach(), rstd, x.detach(), x.detach())),
        (swiglu._forward, (x,)),
        (swiglu._forward, (strided,)),
        (swiglu._backward, (strided.detach(), x.detach()[:, :4])),
        (rope._rope, (q, k, positions, frequencies, 1.0)),
        (rope._rope, (fused, k, positions, frequencies, 1.0)),
        (vocab._partials, (x.detach(), labels, chosen, chosen_logprob, 0)),
        (vocab._gradient, (x.detach().clone(), labels, rows, chosen, chosen_logprob, 0)),
        (adamw._adamw, (*flat, low, one, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.01)),
        (adamw._adamw, (*flat, None, one, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.01)),
    ):
        torch.library.opcheck(operator, arguments)


def test_rope_equals_the_models_own_rotation() -> None:
    q, k = rand(6, 2, 6, dtype=torch.float32), rand(6, 1, 6, dtype=torch.float32)
    for actual, expected in zip(
        rope.rope(q, k, POSITIONS, FREQUENCIES), rotate(q, k, POSITIONS, FREQUENCIES), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_adamw_with_clipping_equals_torch(device: torch.device) -> None:
    """Four steps; the gradient of the second is clipped."""
    start = rand(37, dtype=torch.float32).to(device)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours, low = start.clone(), torch.empty(37, dtype=torch.bfloat16, device=device)
    exp_avg, exp_avg_sq = torch.zeros_like(ours), torch.zeros_like(ours)
    for step in range(1, 5):
        grad = rand(37, seed=step, dtype=torch.float32).to(device) * (10 if step == 2 else 0.1)
        theirs.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        optimizer.step()
        factor = clip_factor(squared_sum(grad), 1.0)
        assert (factor < 1) == (step == 2)
        adamw_(
            *(ours, grad, exp_avg, exp_avg_sq, low, factor),
            **{"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": step},
        )
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(low, ours.bfloat16())
    assert clip_factor(squared_sum(grad), 0.0) == 1.0


def test_silu_saturates_without_nan(device: torch.device) -> None:
    x = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=device, requires_grad=True)
    out = swiglu.swiglu(x)
    out.sum().backward()
    assert torch.equal(out.detach(), F.silu(x[:, :2]).detach() * x[:, 2:].detach())
    assert x.grad is not None
    assert x.grad.isfinite().all()


def update(step: int = 1, **change: Tensor) -> None:
    """An update of four parameters, with a change that makes it impossible."""
    names = ("param_N", "grad_N", "exp_avg_N", "exp_avg_sq_N")
    tensors = {**{name: torch.ones(4) for name in names}, "low_N": None, "factor": torch.ones(()), **change}
    adamw_(**tensors, lr=1.0, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0, step=step)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rms_norm.rms_norm(torch.ones(2, 4), torch.ones(3), 1e-5),
            r"rms_norm: weight is \(H,\) .*; got float32 of shape \(2, 4\), stride \(4, 1\), float32 of shape \(3,\)",
        ),
        (lambda: rms_norm.rms_norm(torch.ones(2, 4), torch.ones(4).bfloat16(), 1e-5), "of the type of x"),
        (
            lambda: rms_norm.add_rms_norm(torch.ones(2, 4), torch.ones(1, 4), torch.ones(4), 1e-5),
            "add_rms_norm: x and residual are alike",
        ),
        (lambda: swiglu.swiglu(torch.ones(2, 3)), r"swiglu: the last dimension .*shape \(2, 3\)"),
        (
            lambda: rope.rope(
                torch.ones(2, 1, 4), torch.ones(2, 1, 4), torch.tensor([0, 1, 2]), torch.ones(2)
            ),
            "rope: q .T, H, D.",
        ),
        (
            lambda: rope.rope(
                torch.ones(2, 1, 4), torch.ones(2, 1, 4).half(), torch.tensor([0, 1]), torch.ones(2)
            ),
            "of one type",
        ),
        (lambda: squared_sum(torch.ones(4)[::2]), r"squared_sum: dense float32 vectors; .* stride \(2,\)"),
        (
            lambda: rms_norm.rms_norm(torch.ones(2, 4).int(), torch.ones(4).int(), 1e-5),
            r"rms_norm: int32 of shape \(2, 4\), stride \(4, 1\); it takes float32, float16 and bfloat16",
        ),
        (lambda: swiglu.swiglu(torch.ones(2, 4).to(torch.float8_e4m3fn)), "swiglu: float8_e4m3fn of shape"),
        (
            lambda: rope.rope(*[torch.ones(2, 1, 4).long()] * 2, torch.tensor([0, 1]), torch.ones(2)),
            "rope: int64 of shape",
        ),
        (
            lambda: swiglu.swiglu(torch.empty(2, 2**31, dtype=torch.bfloat16, device="meta")),
            r"swiglu: a row has fewer than 2³¹ elements; got bfloat16 of shape \(2, 2147483648\)",
        ),
        (
            lambda: vocab.vocab_partials(
                torch.ones(2, 4).long(), torch.zeros(2).long(), torch.zeros(2, 0).long(), torch.zeros(2, 0), 0
            ),
            r"vocab_partials: int64 of shape \(2, 4\)",
        ),
        (
            lambda: vocab.vocab_gradient_(
                torch.ones(2, 4),
                torch.zeros(2).long(),
                torch.ones(2, 6),
                torch.zeros(2, 0).long(),
                torch.zeros(2, 0),
                0,
            ),
            r"vocab_gradient_: seven numbers for each row; .*shape \(2, 6\)",
        ),
        (lambda: update(grad_N=torch.ones(8)[::2]), r"adamw_: four dense float32 vectors .* stride \(2,\)"),
        (
            lambda: update(exp_avg_N=torch.ones(4).bfloat16()),
            r"adamw_: four dense .*bfloat16 of shape \(4,\)",
        ),
        (lambda: update(low_N=torch.ones(3).bfloat16()), r"adamw_: the low-precision copy .*shape \(3,\)"),
        (lambda: update(factor=torch.ones(1)), r"adamw_: the factor is a float32 scalar .*shape \(1,\)"),
        (lambda: update(step=0), "adamw_: step 0; the first update is number 1"),
        (
            lambda: vocab.vocab_partials(
                torch.ones(4, 2).t(), torch.zeros(2).long(), torch.zeros(2, 0).long(), torch.zeros(2, 0), 0
            ),
            r"vocab_partials: dense logits .* stride \(1, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_shape_and_stride(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
