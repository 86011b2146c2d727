"""The kernels on a GPU: as near to float64 as the references are, and the same again in a second run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paralign.engine.kernels.library import find_library
from paralign.engine.kernels.report import report
from paralign.engine.kernels.rms_norm import add_rms_norm, add_rms_norm_ref
from paralign.engine.kernels.swiglu import swiglu, swiglu_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def built() -> None:
    found = find_library()
    if found.library is None:
        pytest.skip(f"the kernels are {found.reason}")


def run(function: Callable, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.ones_like(x) for x in outputs]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, gradients))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 8), (7, 1001), (300, 8192)])
def test_error_is_at_most_twice_the_references(dtype: torch.dtype, rows: int, hidden: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    for operation, reference, inputs in (
        (
            lambda x, r, w: add_rms_norm(x, r, w, 1e-5),
            lambda x, r, w: add_rms_norm_ref(x, r, w, 1e-5),
            [rand(rows, hidden), rand(rows, hidden), rand(hidden)],
        ),
        (swiglu, swiglu_ref, [rand(rows, 2 * hidden)]),
    ):
        actual, again, plain = run(operation, inputs), run(operation, inputs), run(reference, inputs)
        exact = run(reference, [x.double() for x in inputs])
        for a, b, p, e in zip(actual, again, plain, exact, strict=True):
            assert torch.equal(a, b)
            floor = torch.finfo(dtype).eps * e.abs().max()
            assert (a.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + floor


def test_every_operation_agrees_with_its_definition() -> None:
    rows = report(torch.device("cuda"))
    assert {row.implementation for row in rows} == {"CUDA"}
    assert [row for row in rows if not row.agrees] == []
