"""Memory that is given back until the backward pass."""

from __future__ import annotations

import weakref

import torch

from paralign.models.recompute import free_until_backward


def product(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, list[weakref.ref]]:
    """(2x)² w, and the storages of its two steps, which the power and the product keep."""
    doubled = 2 * x
    squared = doubled**2
    out = squared @ w
    free_until_backward(out, (doubled, lambda: 2 * x), (squared, lambda: doubled**2))
    assert doubled.untyped_storage().nbytes() == squared.untyped_storage().nbytes() == 0
    return out, [weakref.ref(tensor.untyped_storage()) for tensor in (doubled, squared)]


def test_memory_is_free_until_the_gradient_arrives_and_after_it() -> None:
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    out, storages = product(x, w)
    loss = out.sum()
    loss.backward()
    expected = torch.autograd.grad((((2 * x) ** 2) @ w).sum(), (x, w))
    assert all(map(torch.equal, expected, (x.grad, w.grad)))
    assert loss.grad_fn is not None  # the graph is still there, and holds none of them
    assert [storage() for storage in storages] == [None, None]


def test_nothing_is_freed_where_nothing_is_kept() -> None:
    made = torch.ones(3)
    with torch.no_grad():
        free_until_backward(made * 2, (made, lambda: torch.zeros(3)))
    assert made.tolist() == [1, 1, 1]
