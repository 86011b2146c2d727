"""The arithmetic of merging one tensor of several models.

Every method is a pass that finds statistics of whole tensors, where it has any, and an elementwise pass in
blocks, in fp32. It yields the result in flat blocks of dtype `out`; a block's memory is used again for the one
after the next. Buffers are made once: to fault fresh pages in costs more than the arithmetic. N models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from paralign.models.weights import in_blocks

BLOCK = 2**18  # elements; a block of every model stays in the processor's cache

Blocks = Sequence[Tensor]  # fp32 blocks of the models at the same place; may be overwritten


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool, out: torch.dtype
) -> Iterator[Tensor]:
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
) -> Iterator[Tensor]:
    """θ₀ + λ Σ wᵢ (θᵢ − θ₀) (arXiv 2212.04089); the sum is divided by Σ wᵢ if `normalize`."""
    total = sum(weights) if normalize else 1.0
    factors = [scale * w / total for w in weights]

    def merge(blocks: Blocks) -> Tensor:
        return blocks[0].add_(_weighted(_deltas(blocks), factors))

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
) -> Iterator[Tensor]:
    """θ₀ + λ times the sum of trimmed deltas that agree in sign (TIES, arXiv 2306.01708).

    Trim: of each delta θᵢ − θ₀ the share `density` that is largest stays, those equal to the smallest kept
    included. Elect: the sign of Σ wᵢ δᵢ. Merge: the sum of wᵢ δᵢ of that sign, divided by the Σ wᵢ of those
    models if `normalize`.
    """
    floors = [_smallest_kept(base, tensor, density) for tensor, density in zip(tensors, densities)]

    def merge(blocks: Blocks) -> Tensor:
        deltas = _deltas(blocks)
        trimmed = [delta.mul_(delta.abs() >= floor) for delta, floor in zip(deltas, floors)]
        return blocks[0].add_(_agreeing(trimmed, weights, normalize=normalize), alpha=scale)

    yield from _elementwise([base, *tensors], merge, out)


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
) -> Iterator[Tensor]:
    """As `ties`, but each delta is kept at random with probability `density` and divided by it.

    That keeps its expectation (DARE, arXiv 2311.03099). `seeds` are one for each model.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def merge(blocks: Blocks) -> Tensor:
        deltas = _deltas(blocks)
        for delta, density, generator in zip(deltas, densities, generators):
            if density < 1:
                kept = torch.empty_like(delta).bernoulli_(density, generator=generator)
                delta.mul_(kept).div_(density)
        return blocks[0].add_(_agreeing(deltas, weights, normalize=normalize), alpha=scale)

    return _elementwise([base, *tensors], merge, out)


def model_stock(
    base: Tensor, tensors: Sequence[Tensor], *, filter_wise: bool, out: torch.dtype
) -> Iterator[Tensor]:
    """t · mean(θᵢ) + (1 − t) θ₀, t = N cos θ / (1 + (N − 1) cos θ) (Model Stock, arXiv 2403.19522, eq. 2 and 5).

    cos θ is the mean, over pairs of models, of the cosine between their deltas θᵢ − θ₀: of the whole tensor,
    or of each row if `filter_wise`. Where the formula has a pole the base stays.
    """
    n = len(tensors)
    rows = base.shape[0] if filter_wise and base.dim() > 1 else 1
    width = base.numel() // rows
    step = max(1, BLOCK // width)  # rows: one, in several blocks, or several in one block
    for first in range(0, rows, step):
        models = [
            tensor.reshape(rows, width)[first : first + step].reshape(-1) for tensor in (base, *tensors)
        ]
        height = models[0].numel() // width
        products = torch.zeros(height, n, n, dtype=torch.float64)
        for blocks in _blocks(models):
            deltas = torch.stack([delta.view(height, -1) for delta in _deltas(blocks)], 1).double()
            products += deltas @ deltas.mT
        norms = products.diagonal(dim1=1, dim2=2).sqrt()
        lengths = (norms[:, :, None] * norms[:, None]).clamp(min=1e-30)
        cosines = (products / lengths).clamp(-1, 1).triu(1).sum((1, 2)) / (n * (n - 1) / 2)
        poles = 1 + (n - 1) * cosines
        share = torch.where(poles.abs() > 1e-6, cosines / poles, 0.0).float()[:, None]  # of each model: t / N

        def merge(blocks: Blocks, height: int = height, share: Tensor = share) -> Tensor:
            total = _weighted(_deltas(blocks), [1.0] * n).view(height, -1).mul_(share)
            return blocks[0].add_(total.view(-1))

        yield from _elementwise(models, merge, out)


def slerp(first: Tensor, second: Tensor, *, t: float, out: torch.dtype) -> Iterator[Tensor]:
    """Spherical interpolation: sin((1 − t) Ω)/sin Ω · θ₀ + sin(t Ω)/sin Ω · θ₁ (Shoemake, SIGGRAPH 1985).

    Ω is the angle between the two as flat vectors; where they are nearly parallel, |cos Ω| > 0.9995, the
    interpolation is linear.
    """
    squares = torch.zeros(3, dtype=torch.float64)
    for blocks in _blocks([first, second]):
        a, b = (block.double() for block in blocks)
        squares += torch.stack((a @ a, b @ b, a @ b))
    aa, bb, ab = squares.tolist()
    cosine = ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 0.0
    factors = [1 - t, t]
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        factors = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    yield from _elementwise([first, second], lambda blocks: _weighted(blocks, factors), out)


def _deltas(blocks: Blocks) -> list[Tensor]:
    return [block.sub_(blocks[0]) for block in blocks[1:]]


def _weighted(blocks: Blocks, weights: Sequence[float]) -> Tensor:
    total = blocks[0].mul_(weights[0])
    for block, weight in zip(blocks[1:], weights[1:]):
        total.add_(block, alpha=weight)
    return total


def _agreeing(deltas: Blocks, weights: Sequence[float], *, normalize: bool) -> Tensor:
    weighted = [delta.mul_(weight) for delta, weight in zip(deltas, weights)]
    positive = _weighted([weighted[0].clone(), *weighted[1:]], [1.0] * len(weighted)) >= 0
    total, divisor = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for delta, weight in zip(weighted, weights):
        agrees = (delta > 0) == positive
        if normalize:  # what was trimmed has no say
            divisor.add_(agrees & (delta != 0), alpha=weight)
        total.add_(delta.mul_(agrees))
    return total.div_(divisor.masked_fill_(divisor == 0, 1.0)) if normalize else total


def _smallest_kept(base: Tensor, tensor: Tensor, density: float) -> float:
    """Magnitude of the k-th largest delta, k = density × elements, at least one."""
    if density >= 1:
        return 0.0
    magnitudes = torch.empty(base.numel(), dtype=torch.float32)
    at = 0
    for blocks in _blocks([base, tensor]):
        (delta,) = _deltas(blocks)
        torch.abs(delta, out=magnitudes[at : at + delta.numel()])
        at += delta.numel()
    kept = max(1, int(density * base.numel()))
    magnitudes.numpy().partition(base.numel() - kept)  # in place; torch's kthvalue copies and is slower
    return float(magnitudes[base.numel() - kept])


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    buffers = [torch.empty(BLOCK) for _ in tensors]
    for pieces in in_blocks(*([tensor] for tensor in tensors), elements=BLOCK):
        yield [buffer[: piece.numel()].copy_(piece) for buffer, piece in zip(buffers, pieces)]


def _elementwise(
    tensors: Sequence[Tensor], merge: Callable[[Blocks], Tensor], out: torch.dtype
) -> Iterator[Tensor]:
    result, other = torch.empty(BLOCK, dtype=out), torch.empty(BLOCK, dtype=out)
    for blocks in _blocks(tensors):
        yield result[: blocks[0].numel()].copy_(merge(blocks))
        result, other = other, result
