"""Whether all nodes see one run_dir, and how much room it has."""

from __future__ import annotations

import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ...files.refused import refusal

_PATIENCE = 5.0  # seconds until a network file system shows what another node wrote


@dataclass(frozen=True)
class Disk:
    """What a rank finds in run_dir.

    Attributes:
        free: bytes, or 0 where it cannot be told.
        refused: why this rank could not write there; "" if it could.
        unseen: ranks whose files it did not see.
    """

    free: int
    refused: str
    unseen: tuple[int, ...]


def look(run_dir: Path) -> Disk:
    """Each rank writes a file; each sees that of rank 0, and rank 0 sees all. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, 0)
    directory = run_dir / f".preflight-{name[0]}"
    refused, free = "", 0
    if rank == 0:
        refused = _try_to_write(directory, rank)
    dist.barrier()  # the directory is there
    if rank:
        refused = _try_to_write(directory, rank)
    with suppress(OSError):
        free = shutil.disk_usage(directory).free
    dist.barrier()
    deadline = time.monotonic() + _PATIENCE
    expected = range(world_size) if rank == 0 else (0,)
    unseen = tuple(other for other in expected if not _seen(directory / str(other), other, deadline))
    dist.barrier()
    # Also what a rank wrote that sees another directory of this name.
    with suppress(OSError):
        (directory / str(rank)).unlink()
    dist.barrier()
    with suppress(OSError):
        directory.rmdir()
    return Disk(free, refused, unseen)


def _try_to_write(directory: Path, rank: int) -> str:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / str(rank)).write_text(str(rank), encoding="utf-8")
    except OSError as error:
        return refusal(error, directory)
    return ""


def _seen(path: Path, rank: int, deadline: float) -> bool:
    while True:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == str(rank):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
