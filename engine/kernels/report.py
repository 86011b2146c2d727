"""What `paralign kernels` prints: each operation, what runs it here, and whether that agrees with its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paralign.models.head_read import TopK

from .adamw import adamw_, squared_sum
from .library import find_library
from .rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from .rope import rope, rope_ref
from .swiglu import swiglu, swiglu_ref
from .token_statistics import token_statistics, token_statistics_ref

TOLERANCE = 2.0**-7  # one rounding of bfloat16, of the largest entry
Pairs = list[tuple[Tensor, Tensor]]  # what an operation gave, and what its definition gives


@dataclass(frozen=True)
class OperationReport:
    """One operation on this device; `error` is the worst of its check, relative to the largest entry."""

    name: str
    implementation: str
    error: float

    @property
    def agrees(self) -> bool:
        return self.error <= TOLERANCE


def report(device: torch.device) -> list[OperationReport]:
    """Every operation's implementation and self-check, forward and backward, on small bf16 inputs."""
    on_cuda = device.type == "cuda" and find_library().library is not None
    implementation = "CUDA" if on_cuda else "reference"
    return [
        OperationReport(name, implementation, max(_error(a, b) for a, b in check(device)))
        for name, check in _CHECKS.items()
    ]


def _error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.double().abs().max().clamp(min=1e-30)
    error = ((actual.double() - expected.double()).abs().max() / scale).item()
    return error if error == error else float("inf")  # NaN is no agreement


def _both_ways(operation: Callable[..., Any], definition: Callable[..., Any], inputs: list[Tensor]) -> Pairs:
    """Outputs and gradients of both on the same inputs; the definition is given float32."""

    def run(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        returned = function(*leaves)
        outputs = [x for x in returned if x is not None] if isinstance(returned, tuple) else [returned]
        weights = [torch.linspace(-1, 1, x.numel(), device=x.device).reshape(x.shape) for x in outputs]
        loss = sum((x.float() * w).sum() for x, w in zip(outputs, weights))
        return [x.detach() for x in outputs] + list(torch.autograd.grad(loss, leaves))

    return list(zip(run(operation, inputs), run(definition, [x.float() for x in inputs]), strict=True))


def _random(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)


def _check_rms_norm(device: torch.device) -> Pairs:
    inputs = [_random(device, 33, 5, 128), _random(device, 128)]  # heads: several rows a warp
    return _both_ways(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_ref(x, w, 1e-5), inputs)


def _check_add_rms_norm(device: torch.device) -> Pairs:
    inputs = [_random(device, 33, 4096), _random(device, 34, 4096)[:33], _random(device, 4096)]
    return _both_ways(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5), lambda x, r, w: add_rms_norm_ref(x, r, w, 1e-5), inputs
    )


def _check_swiglu(device: torch.device) -> Pairs:
    return _both_ways(swiglu, swiglu_ref, [_random(device, 33, 512)])


def _check_rope(device: torch.device) -> Pairs:
    positions = torch.arange(33, device=device) % 20
    frequencies = 1e4 ** -torch.linspace(0, 1, 32, device=device)
    return _both_ways(
        lambda q, k: rope(q, k, positions, frequencies),
        lambda q, k: rope_ref(q, k, positions, frequencies),
        [_random(device, 33, 4, 64), _random(device, 33, 2, 64)],
    )


def _check_token_statistics(device: torch.device) -> Pairs:
    labels = (torch.arange(9, device=device) * 31) % 300
    chosen = (torch.arange(9, device=device)[:, None] * 7 + torch.arange(5, device=device)) % 300
    reference = TopK(chosen, _random(device, 9, 5).float())
    return _both_ways(
        lambda h, w: token_statistics(h, w, labels, vocab_size=300, reference=reference)[:3],
        lambda h, w: token_statistics_ref(h, w, labels, reference)[:3],
        [_random(device, 9, 64), _random(device, 300, 64) / 8],
    )


def _check_squared_sum(device: torch.device) -> Pairs:
    vectors = [_random(device, 5001).float(), _random(device, 7).float()]
    return [(squared_sum(*vectors), torch.cat(vectors).double().square().sum())]


def _check_adamw(device: torch.device) -> Pairs:
    param, grad = _random(device, 1000).float(), _random(device, 1001)[1:].float().clone()
    expected = param.clone().requires_grad_()
    expected.grad = grad.clone()
    torch.optim.AdamW([expected], lr=1e-2, weight_decay=0.1).step()
    low = torch.empty(1000, dtype=torch.bfloat16, device=device)
    state = torch.zeros_like(param), torch.zeros_like(param)
    factor = torch.ones((), device=device)
    adamw_(
        *(param, grad, *state, low, factor),
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        step=1,
    )
    return [(param, expected.detach()), (low, expected.detach())]


_CHECKS: dict[str, Callable[[torch.device], Pairs]] = {
    "rms_norm": _check_rms_norm,
    "add_rms_norm": _check_add_rms_norm,
    "swiglu": _check_swiglu,
    "rope": _check_rope,
    "token_statistics": _check_token_statistics,
    "squared_sum": _check_squared_sum,
    "adamw_": _check_adamw,
}
