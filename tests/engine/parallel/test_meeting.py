"""Attempts that use one store: each has a part of its own, whatever was said before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from paralign.engine.parallel.meeting import of_this_attempt
from paralign.models.errors import TrainingError


def test_each_attempt_has_a_part_of_its_own_at_any_size() -> None:
    store = dist.HashStore()
    seen = set()
    for world_size in (3, 3, 2, 4):
        with ThreadPoolExecutor(world_size) as ranks:
            parts = list(
                ranks.map(
                    lambda rank, n=world_size: of_this_attempt(store, rank, n, timedelta(seconds=20)),
                    reversed(range(world_size)),
                )
            )
        assert parts[0].add("ranks that failed", 1) == 1
        assert [part.add("ranks that failed", 0) for part in parts] == [1] * world_size
        parts[-1].set("key", f"of {len(seen)}")
        seen.add(parts[0].get("key"))
    assert len(seen) == 4


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(TrainingError, match="rank 1 has not come"):
        of_this_attempt(dist.HashStore(), 0, 2, timedelta(seconds=0.1))
    with pytest.raises(TrainingError, match="rank 0 has not come"):
        of_this_attempt(dist.HashStore(), 1, 2, timedelta(seconds=0.1))
