"""Three ranks of a vocabulary-parallel head, each a thread, with the shipped CUDA source under them on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from paralign.engine.kernels import vocab
from paralign.engine.kernels.library import KernelLibrary
from paralign.engine.kernels.token_statistics import token_statistics, token_statistics_ref
from paralign.models.head_read import TopK

RANKS, COLUMNS, VOCABULARY, HIDDEN, ROWS, K = 3, 40, 107, 16, 7, 5  # the last shard has 13 columns of padding


class Rank:
    """A process group of three threads, as one of them sees it."""

    def __init__(self, rank: int, shared: SimpleNamespace) -> None:
        self._rank, self.shared = rank, shared

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return RANKS


def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
    group.shared.parts[group.rank()] = tensor.clone()
    group.shared.barrier.wait(30)
    together = torch.stack(group.shared.parts)
    tensor.copy_(together.amax(0) if op == dist.ReduceOp.MAX else together.sum(0))
    group.shared.barrier.wait(30)


class OneAtATime:
    """The stand-in runs one launch at a time."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library, self._lock, self.calls = library, Lock(), 0

    def call(self, *arguments: Any) -> None:
        with self._lock:
            self.calls += 1
            self._library.call(*arguments)


@pytest.fixture
def on_ranks(
    cpu_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Any], Any]], list]:
    """Runs a function of the group on three ranks; every operation on logits is the CUDA source's."""
    library = OneAtATime(cpu_library)
    monkeypatch.setattr(vocab, "library_for", lambda x: library)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def run(function: Callable[[Any], Any]) -> list:
        shared = SimpleNamespace(parts=[None] * RANKS, barrier=Barrier(RANKS))
        with ThreadPoolExecutor(RANKS) as pool:
            results = list(pool.map(function, [Rank(rank, shared) for rank in range(RANKS)]))
        assert library.calls >= 2 * RANKS
        return results

    return run


def make(scale: float) -> tuple[Tensor, Tensor, Tensor, TopK]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator) * scale
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.tensor([0, 39, 40, 79, 80, 106, 53])  # the edges of every shard
    indices = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:K] for _ in range(ROWS)])
    return hidden, weight, labels, TopK(indices, torch.randn(ROWS, K, generator=generator))


def shard_of(weight: Tensor, rank: int) -> Any:
    padded = torch.zeros(RANKS * COLUMNS, HIDDEN)
    padded[:VOCABULARY] = weight
    shard: Any = padded[rank * COLUMNS : (rank + 1) * COLUMNS].clone().requires_grad_()
    shard.main_grad, shard.grad_added_to_main_grad = torch.zeros_like(shard), False
    return shard


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within fp32's error of products and sums over the vocabulary."""
    assert (actual.double() - expected).abs().max() <= 2e-6 * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("scale", [1.0, 300.0, 1e-4], ids=["", "huge logits", "tiny logits"])
@pytest.mark.parametrize("rows_at_once", [ROWS, 2])
def test_three_shards_equal_the_whole(on_ranks: Callable, scale: float, rows_at_once: int) -> None:
    hidden, weight, labels, reference = make(scale)
    weights = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(1))

    def one(group: Rank) -> tuple[list[Tensor], Tensor, Tensor]:
        own, shard = hidden.clone().requires_grad_(), shard_of(weight, group.rank())
        statistics = token_statistics(
            *(own, shard, labels),
            **{"vocab_size": VOCABULARY, "reference": reference, "group": group},
            workspace_bytes=rows_at_once * COLUMNS * 4,
        )
        sum((c * x).sum() for c, x in zip(weights, statistics[:3], strict=True)).backward()
        assert own.grad is not None
        return [x.detach() for x in statistics], own.grad, shard.main_grad

    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    theirs = TopK(reference.indices_RK, reference.logprobs_RK.double())
    expected = token_statistics_ref(*leaves, labels, theirs)
    sum((c * x).sum() for c, x in zip(weights.double(), expected[:3], strict=True)).backward()
    results = on_ranks(one)
    for statistics, _, _ in results:
        for actual, wanted in zip(statistics, expected, strict=True):
            assert_close(actual, wanted)
    assert_close(torch.stack([gradient for _, gradient, _ in results]).sum(0), leaves[0].grad)
    whole = torch.cat([shard for _, _, shard in results])
    assert_close(whole[:VOCABULARY], leaves[1].grad)
    assert not whole[VOCABULARY:].any()


def test_gradients_known_beforehand_equal_the_whole(on_ranks: Callable) -> None:
    hidden, weight, labels, _ = make(1.0)

    def one(group: Rank) -> tuple[Tensor, Tensor, Tensor]:
        own, shard = hidden.clone().requires_grad_(), shard_of(weight, group.rank())
        logprobs = token_statistics(
            *(own, shard, labels),
            **{"vocab_size": VOCABULARY, "group": group, "row_gradient": torch.full(labels.shape, -0.125)},
            workspace_bytes=2 * COLUMNS * 4,
        ).logprob_R
        (-0.125 * logprobs.sum()).backward()
        assert own.grad is not None
        return logprobs.detach(), own.grad, shard.main_grad

    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = token_statistics_ref(*leaves, labels).logprob_R
    (-0.125 * expected.sum()).backward()
    results = on_ranks(one)
    for logprobs, _, _ in results:
        assert_close(logprobs, expected)
    assert_close(torch.stack([gradient for _, gradient, _ in results]).sum(0), leaves[0].grad)
    assert_close(torch.cat([shard for _, _, shard in results])[:VOCABULARY], leaves[1].grad)
