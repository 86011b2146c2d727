"""The vocabulary-parallel head over real ranks equals one rank, however the vocabulary is divided and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from paralign.engine.kernels.token_statistics import token_statistics, token_statistics_ref
from paralign.models.head_read import TopK

from .pool import RankPool

VOCABULARY, HIDDEN, ROWS, K = 23, 8, 6, 5
BY_ROW = torch.tensor([-0.5, -0.25, 0.0, -0.5, -1.0, -0.125], dtype=torch.float64)


def _inputs() -> tuple[Tensor, Tensor, Tensor, TopK, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    indices = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:K] for _ in range(ROWS)])
    reference = TopK(indices, torch.randn(ROWS, K, generator=generator, dtype=torch.float64))
    return hidden, weight, labels, reference, torch.randn(3, ROWS, generator=generator, dtype=torch.float64)


def on_ranks(rank: int, world_size: int, columns: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Statistics, and the gradients of a weighted sum of them: for hidden summed over ranks, for this shard."""
    hidden, weight, labels, reference, coefficients = _inputs()
    padded = torch.zeros(columns * world_size, HIDDEN, dtype=torch.float64)
    padded[:VOCABULARY] = weight
    shard = padded[rank * columns : (rank + 1) * columns].clone().requires_grad_()
    hidden.requires_grad_()
    statistics = token_statistics(
        *(hidden, shard, labels),
        **{"vocab_size": VOCABULARY, "reference": reference, "group": dist.group.WORLD},
        workspace_bytes=2 * columns * 8,
    )
    sum((c * x).sum() for c, x in zip(coefficients, statistics[:3], strict=True)).backward()
    assert hidden.grad is not None
    assert shard.grad is not None
    dist.all_reduce(hidden.grad)
    return [x.detach() for x in statistics], hidden.grad, shard.grad


@pytest.mark.parametrize(
    ("world_size", "columns"), [(2, 12), (3, 8), (4, 8)], ids=["2", "3", "4, one all padding"]
)
def test_shards_equal_the_whole(world_size: int, columns: int, ranks: RankPool) -> None:
    hidden, weight, labels, reference, coefficients = _inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = token_statistics_ref(hidden, weight, labels, reference)
    sum((c * x).sum() for c, x in zip(coefficients, expected[:3], strict=True)).backward()
    results = ranks.run(world_size, on_ranks, columns)
    for statistics, hidden_gradient, _ in results:
        torch.testing.assert_close(statistics, [x.detach() for x in expected])
        torch.testing.assert_close(hidden_gradient, hidden.grad)
    whole = torch.cat([shard for _, _, shard in results])
    torch.testing.assert_close(whole[:VOCABULARY], weight.grad)
    assert not whole[VOCABULARY:].any()


def known_on_ranks(rank: int, world_size: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and gradients of a weighted sum of them, made in the forward pass."""
    hidden, weight, labels, _, _ = _inputs()
    padded = torch.zeros(columns * world_size, HIDDEN, dtype=torch.float64)
    padded[:VOCABULARY] = weight
    shard: Any = padded[rank * columns : (rank + 1) * columns].clone().requires_grad_()
    shard.main_grad, shard.grad_added_to_main_grad = torch.zeros_like(shard), False
    hidden.requires_grad_()
    logprobs = token_statistics(
        *(hidden, shard, labels),
        **{"vocab_size": VOCABULARY, "group": dist.group.WORLD, "row_gradient": BY_ROW},
        workspace_bytes=2 * columns * 8,
    ).logprob_R
    made = shard.main_grad.clone()
    (BY_ROW * logprobs).sum().backward()
    assert torch.equal(made, shard.main_grad)
    assert hidden.grad is not None
    dist.all_reduce(hidden.grad)
    return logprobs.detach(), hidden.grad, made


@pytest.mark.parametrize(("world_size", "columns"), [(3, 8), (4, 8)], ids=["3", "4, one all padding"])
def test_gradients_known_beforehand_over_shards(world_size: int, columns: int, ranks: RankPool) -> None:
    hidden, weight, labels, _, _ = _inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = token_statistics_ref(hidden, weight, labels).logprob_R
    (BY_ROW * expected).sum().backward()
    results = ranks.run(world_size, known_on_ranks, columns)
    for logprobs, hidden_gradient, _ in results:
        torch.testing.assert_close(logprobs, expected.detach())
        torch.testing.assert_close(hidden_gradient, hidden.grad)
    whole = torch.cat([shard for _, _, shard in results])
    torch.testing.assert_close(whole[:VOCABULARY], weight.grad)
    assert not whole[VOCABULARY:].any()
