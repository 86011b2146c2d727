"""A process group of this process alone, for benchmarks of one rank."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from paralign.engine.parallel.mesh import open_world


@contextmanager
def one_rank() -> Iterator[None]:
    """Open it, and leave it at the end; the ranks would meet in a file, so no port is needed."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        with open_world(rank=0, world_size=1, local_rank=0, timeout_minutes=10, store=store):
            yield
