"""A matrix product on a device: how fast, and whether it is right."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import torch

_SIZES = {"cuda": (8192, torch.bfloat16), "cpu": (512, torch.float32)}
_TIMES = 8


@dataclass(frozen=True)
class Product:
    """What came of it.

    Attributes:
        tflops: 10¹² floating-point operations a second, in the fastest of several products.
        digest: of the result's bits; the same on devices of one kind with the same libraries.
        steady: whether all products were equal to the bit.
    """

    tflops: float
    digest: str
    steady: bool


def multiply(device: torch.device) -> Product:
    """Multiply two matrices several times; their entries are the same on every rank."""
    size, dtype = _SIZES[device.type]
    # Integers modulo a prime, scaled to [−1, 1]: every rank makes the same, without a generator's state.
    entries = torch.arange(size * size, device=device).remainder_(8191).view(size, size)
    a = (entries.double() / 4095 - 1).to(dtype)
    b = (entries.T.double() / 4095 - 1).to(dtype).contiguous()
    results, seconds = [], []
    for _ in range(_TIMES):
        _wait(device)
        began = time.perf_counter()
        product = a @ b
        _wait(device)
        seconds.append(time.perf_counter() - began)
        results.append(_digest(product))
    return Product(2 * size**3 / min(seconds) / 1e12, results[0], len(set(results)) == 1)


def _digest(result: torch.Tensor) -> str:
    kept = result.view(torch.uint8).cpu().numpy()
    return hashlib.sha256(kept).hexdigest()[:16]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
