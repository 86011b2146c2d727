"""The kernels on a GPU: as near to float64 as the references are, and the same again in a second run.

What is here besides runs on the CPU too, by the fixture `device` of the tests beside this, and in tests/csrc.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paralign.engine.kernels.adamw import adamw_, clip_factor, squared_sum
from paralign.engine.kernels.report import report
from paralign.engine.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from paralign.engine.kernels.rope import rope, rope_ref
from paralign.engine.kernels.swiglu import swiglu, swiglu_ref
from paralign.engine.kernels.token_statistics import token_statistics, token_statistics_ref
from paralign.models.head_read import TopK
from paralign.models.weight_gradient import accumulate

pytestmark = pytest.mark.gpu
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def run(function: Callable, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    returned = function(*leaves)
    outputs = [x for x in returned if x is not None] if isinstance(returned, tuple) else [returned]
    gradients = [torch.linspace(-1, 1, x.numel(), device=x.device).to(x.dtype).view_as(x) for x in outputs]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, gradients))]


def assert_as_exact_as_its_reference(operation: Callable, reference: Callable, inputs: list[Tensor]) -> None:
    """The error against float64 is at most twice the reference's in the same precision; twice run, once seen."""
    actual, again, plain = run(operation, inputs), run(operation, inputs), run(reference, inputs)
    exact = run(reference, [x.double() for x in inputs])
    for a, b, p, e in zip(actual, again, plain, exact, strict=True):
        assert torch.equal(a, b)
        floor = torch.finfo(a.dtype).eps * e.abs().max()
        assert (a.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + floor


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 8), (7, 1001), (300, 8192), (5000, 128), (2048, 8192)])
def test_rows(gpu: torch.device, dtype: torch.dtype, rows: int, hidden: int) -> None:
    del gpu
    x, r, w = (rand(*shape, dtype=dtype) for shape in ((rows, hidden), (rows + 1, hidden), (hidden,)))
    assert_as_exact_as_its_reference(
        lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_ref(x, w, 1e-5), [x, w]
    )
    assert_as_exact_as_its_reference(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: add_rms_norm_ref(x, r, w, 1e-5),
        [x, r[1:], w],
    )
    assert_as_exact_as_its_reference(swiglu, swiglu_ref, [rand(rows, 2 * hidden, dtype=dtype, scale=5.0)])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (77, 96), (300, 128)])
def test_rotation(gpu: torch.device, dtype: torch.dtype, rows: int, channels: int) -> None:
    """Queries and keys of one projection, positions up to 128K."""
    positions = torch.arange(rows, device=gpu) * 437 % 131072
    frequencies = 5e5 ** -torch.linspace(0, 1, channels // 2, device=gpu)
    assert_as_exact_as_its_reference(
        lambda x: rope(x[:, :8], x[:, 8:10], positions, frequencies),
        lambda x: rope_ref(x[:, :8], x[:, 8:10], positions, frequencies),
        [rand(rows, 12, channels, dtype=dtype)],
    )


def definition(labels: Tensor, reference: TopK) -> Callable:
    """In the type of its input, a reference model's log-probabilities with it."""

    def statistics(h: Tensor, w: Tensor) -> Any:
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        return token_statistics_ref(h, w, labels, TopK(reference.indices_RK, reference.logprobs_RK.to(wide)))

    return statistics


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "vocabulary", "k"), [(1, 7, 7), (19, 1003, 11), (64, 32000, 500)])
@pytest.mark.parametrize("rows_at_once", [5, 64])
def test_vocabulary(
    gpu: torch.device, dtype: torch.dtype, rows: int, vocabulary: int, k: int, rows_at_once: int
) -> None:
    hidden, weight = rand(rows, 256, dtype=dtype), rand(vocabulary, 256, dtype=dtype, scale=1 / 16)
    labels = torch.arange(rows, device=gpu) * 31 % vocabulary
    chosen = torch.stack([torch.randperm(vocabulary, device=gpu)[:k] for _ in range(rows)])
    reference = TopK(chosen, rand(rows, k))
    assert_as_exact_as_its_reference(
        lambda h, w: tuple(
            token_statistics(
                h,
                w,
                labels,
                vocab_size=vocabulary,
                reference=reference,
                workspace_bytes=rows_at_once * vocabulary * h.element_size(),
            )[:3]
        ),
        lambda h, w: tuple(definition(labels, reference)(h, w)[:3]),
        [hidden, weight],
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_known_beforehand_are_those_of_the_backward_pass(
    gpu: torch.device, dtype: torch.dtype
) -> None:
    labels = torch.arange(19, device=gpu) * 31 % 1003
    found = []
    for known in (None, torch.full((19,), -1 / 19, device=gpu)):
        hidden = rand(19, 256, dtype=dtype).requires_grad_()
        weight: Any = rand(1003, 256, dtype=dtype, scale=1 / 16).requires_grad_()
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(1003, 256, device=gpu), False
        logprobs = token_statistics(
            hidden,
            weight,
            labels,
            vocab_size=1003,
            row_gradient=known,
            workspace_bytes=5 * 1003 * hidden.element_size(),
        ).logprob_R
        (-logprobs.sum() / 19).backward()
        found.append((logprobs.detach(), hidden.grad, weight.main_grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("known", [False, True])
def test_a_label_outside_the_vocabulary_is_nan_and_so_is_its_gradient(gpu: torch.device, known: bool) -> None:
    hidden = rand(6, 32).requires_grad_()
    weight: Any = rand(50, 32).requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(50, 32, device=gpu), False
    labels = torch.tensor([0, 50, 1, -1, 49, 2], device=gpu)
    logprobs = token_statistics(
        hidden,
        weight,
        labels,
        vocab_size=50,
        row_gradient=torch.ones(6, device=gpu) if known else None,
        workspace_bytes=2 * 50 * 4,
    ).logprob_R
    assert logprobs.isnan().tolist() == [False, True, False, True, False, False]
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isnan().any(1).tolist() == [False, True, False, True, False, False]
    assert weight.main_grad.isnan().any()


@pytest.mark.parametrize("count", [1, 1003, 2**20 + 5])
@pytest.mark.parametrize("low_type", [None, *TYPES])
def test_update(gpu: torch.device, count: int, low_type: torch.dtype | None) -> None:
    """Three clipped steps beside torch's own in float64."""
    param = rand(count)
    theirs = param.double().requires_grad_()
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([theirs], **settings)
    state = torch.zeros_like(param), torch.zeros_like(param)
    low = None if low_type is None else torch.full((count,), torch.nan, dtype=low_type, device=gpu)
    for step in range(1, 4):
        grad = rand(count + step)[step:].clone()
        theirs.grad = grad.double()
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        optimizer.step()
        squares = squared_sum(grad)
        assert torch.equal(squares, squared_sum(grad))
        torch.testing.assert_close(squares, grad.double().square().sum(), rtol=1e-6, atol=0)
        adamw_(param, grad, *state, low, clip_factor(squares, 0.5), **settings, step=step)
    torch.testing.assert_close(param.double(), theirs.detach(), rtol=1e-5, atol=1e-6)
    if low is not None:
        assert torch.equal(low, param.to(low.dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_weight_gradient_is_summed_in_fp32(gpu: torch.device, dtype: torch.dtype) -> None:
    x, dy, sums = rand(300, 64, dtype=dtype), rand(300, 96, dtype=dtype), rand(96, 64)
    wanted = sums.double() + dy.double().t() @ x.double()
    accumulate(x, dy, sums)
    # What is left is the rounding of fp32 sums (of TF32 products, where torch is told to use them, not here).
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-3)
    assert sums.device == gpu


def test_every_operation_agrees_with_its_definition(gpu: torch.device) -> None:
    rows = report(gpu)
    assert {row.implementation for row in rows} == {"CUDA"}
    assert [row for row in rows if not row.agrees] == []
