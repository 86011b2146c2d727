"""The arithmetic of merging one tensor of several models. Owns formulas, no files and no configuration.

Every method is a pass that finds statistics of whole tensors, where it has any, and an elementwise pass in
blocks, in fp32, so that memory beyond the result does not grow with the tensor. N models, flat tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 2**20  # elements; a block of every model stays in the processor's cache

Blocks = Sequence[Tensor]  # fp32 blocks of the models at the same place


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool, out: torch.dtype
) -> Tensor:
    """Σ wᵢ θᵢ, divided by Σ wᵢ if `normalize` (model soups, arXiv 2203.05482)."""
    total = sum(weights) if normalize else 1.0
    return _elementwise(tensors, lambda blocks: _weighted(blocks, [w / total for w in weights]), out)


def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: float,
    normalize: bool,
    out: torch.dtype,
) -> Tensor:
    """θ₀ + λ Σ wᵢ (θᵢ − θ₀) (arXiv 2212.04089); the sum is divided by Σ wᵢ if `normalize`."""
    total = sum(weights) if normalize else 1.0
    factors = [scale * w / total for w in weights]

    def merge(blocks: Blocks) -> Tensor:
        return blocks[0] + _weighted([block - blocks[0] for block in blocks[1:]], factors)

    return _elementwise([base, *tensors], merge, out)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    densities: Sequence[float],
    scale: float,
    normalize: bool,
    out: torch.dtype,
) -> Tensor:
    """θ₀ + λ times the sum of trimmed deltas that agree in sign (TIES, arXiv 2306.01708).

    Trim: of each delta θᵢ − θ₀ the share `density` that is largest stays, those equal to the smallest kept
    included. Elect: the sign of Σ wᵢ δᵢ. Merge: the sum of wᵢ δᵢ of that sign, divided by the Σ wᵢ of those
    models if `normalize`.
    """
    floors = [_smallest_kept(base, tensor, density) for tensor, density in zip(tensors, densities)]

    def merge(blocks: Blocks) -> Tensor:
        deltas = [block - blocks[0] for block in blocks[1:]]
        trimmed = [delta.where(delta.abs() >= floor, 0.0) for delta, floor in zip(deltas, floors)]
        return blocks[0] + scale * _agreeing(trimmed, weights, normalize=normalize)

    return _elementwise([base, *tensors], merge, out)


def dare_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    densities: Sequence[float],
    scale: float,
    normalize: bool,
    out: torch.dtype,
    seeds: Sequence[int],
) -> Tensor:
    """As `ties`, but each delta is kept at random with probability `density` and divided by it.

    That keeps its expectation (DARE, arXiv 2311.03099). `seeds` are one for each model.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def merge(blocks: Blocks) -> Tensor:
        dropped = []
        for block, density, generator in zip(blocks[1:], densities, generators):
            delta = block - blocks[0]
            if density < 1:
                kept = torch.empty_like(delta).bernoulli_(density, generator=generator)
                delta = delta * kept / density
            dropped.append(delta)
        return blocks[0] + scale * _agreeing(dropped, weights, normalize=normalize)

    return _elementwise([base, *tensors], merge, out)


def model_stock(base: Tensor, tensors: Sequence[Tensor], *, filter_wise: bool, out: torch.dtype) -> Tensor:
    """t · mean(θᵢ) + (1 − t) θ₀, t = N cos θ / (1 + (N − 1) cos θ) (Model Stock, arXiv 2403.19522, eq. 2 and 5).

    cos θ is the mean, over pairs of models, of the cosine between their deltas θᵢ − θ₀: of the whole tensor,
    or of each row if `filter_wise`. Where the formula has a pole the base stays.
    """
    n = len(tensors)
    if filter_wise and base.dim() > 1:
        merged = [
            model_stock(base[row], [t[row] for t in tensors], filter_wise=False, out=out)
            for row in range(base.shape[0])
        ]
        return torch.stack(merged)
    products = torch.zeros(n, n, dtype=torch.float64)
    for blocks in _blocks([base, *tensors]):
        deltas = torch.stack([block - blocks[0] for block in blocks[1:]]).double()
        products += deltas @ deltas.t()
    norms = products.diagonal().sqrt()
    cosines = (products / (norms[:, None] * norms).clamp(min=1e-30)).clamp(-1, 1)
    cosine = (cosines.sum() - cosines.diagonal().sum()).item() / (n * (n - 1))
    pole = 1 + (n - 1) * cosine
    ratio = n * cosine / pole if abs(pole) > 1e-6 else 0.0
    factors = [ratio / n] * n
    return _elementwise([base, *tensors], lambda blocks: _weighted(blocks, [1 - ratio, *factors]), out)


def slerp(first: Tensor, second: Tensor, *, t: float, out: torch.dtype) -> Tensor:
    """Spherical interpolation: sin((1 − t) Ω)/sin Ω · θ₀ + sin(t Ω)/sin Ω · θ₁ (Shoemake, SIGGRAPH 1985).

    Ω is the angle between the two as flat vectors; where they are nearly parallel, |cos Ω| > 0.9995, the
    interpolation is linear.
    """
    squares = torch.zeros(3, dtype=torch.float64)
    for a, b in _blocks([first, second]):
        a, b = a.double(), b.double()
        squares += torch.stack((a @ a, b @ b, a @ b))
    aa, bb, ab = squares.tolist()
    cosine = ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 0.0
    factors = [1 - t, t]
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        factors = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return _elementwise([first, second], lambda blocks: _weighted(blocks, factors), out)


def _weighted(blocks: Blocks, weights: Sequence[float]) -> Tensor:
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:]):
        total.add_(block, alpha=weight)
    return total


def _agreeing(deltas: Blocks, weights: Sequence[float], *, normalize: bool) -> Tensor:
    weighted = [delta * weight for delta, weight in zip(deltas, weights)]
    positive = torch.stack(weighted).sum(0) >= 0
    total, divisor = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for delta, weight in zip(weighted, weights):
        agrees = ((delta > 0) & positive) | ((delta < 0) & ~positive)
        total += delta.where(agrees, 0.0)
        divisor.add_(agrees, alpha=weight)
    return total / divisor.where(divisor != 0, 1.0) if normalize else total


def _smallest_kept(base: Tensor, tensor: Tensor, density: float) -> float:
    """Magnitude of the k-th largest delta, k = density × elements, at least one."""
    if density >= 1:
        return 0.0
    magnitudes = torch.empty(base.numel(), dtype=torch.float32)
    at = 0
    for a, b in _blocks([base, tensor]):
        magnitudes[at : at + a.numel()] = (b - a).abs()
        at += a.numel()
    kept = max(1, int(density * base.numel()))
    magnitudes.numpy().partition(base.numel() - kept)  # in place; torch's kthvalue copies and is slower
    return float(magnitudes[base.numel() - kept])


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        yield [tensor[start : start + BLOCK].float() for tensor in flat]


def _elementwise(tensors: Sequence[Tensor], merge: Callable[[Blocks], Tensor], out: torch.dtype) -> Tensor:
    result = torch.empty(tensors[0].shape, dtype=out)
    flat, at = result.view(-1), 0
    for blocks in _blocks(tensors):
        flat[at : at + blocks[0].numel()] = merge(blocks)
        at += blocks[0].numel()
    return result
