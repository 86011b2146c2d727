"""What a child is given to write; saves themselves are tested in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paralign.models.mcore import staged


def test_what_lies_in_pinned_memory_is_copied_before_a_child_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that are offloaded; a child may see what the next step makes of them."""
    pinned, plain = torch.ones(3), torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda value: value is pinned)
    bucket = ("path", "name", ([], [("first", pinned), ("second", plain)]))
    request: Any = SimpleNamespace(async_fn_args=[0, [bucket], None])
    [(_, _, (_, tensors))] = staged(request)
    pinned.zero_()
    assert [(item, value.tolist()) for item, value in tensors] == [
        ("first", [1.0] * 3),
        ("second", [1.0] * 3),
    ]
    assert tensors[1][1] is plain
