"""SHA-256 of tensors, and of tensors that are read: are they what was written?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from paralign.models.errors import WeightsError
from paralign.models.weights import Views, in_blocks

from .manifest import Digest
from .rawfile import Mapped, lightly, raw


def digest(shape: Sequence[int], parts: Views, *sources: Mapped) -> Digest:
    """The digest of a tensor of `shape` on the CPU; `sources` are those that it may be mapped from."""
    hasher = hashlib.sha256()
    name = ""
    for (block,) in lightly(in_blocks(parts), *sources):
        hasher.update(raw(block))
        name = str(block.dtype).removeprefix("torch.")
    return Digest(list(shape), name, hasher.hexdigest())


def tensor_fault(shape: Sequence[int], parts: Views, expected: Digest | None, source: Mapped) -> str:
    """In what a tensor differs from what its manifest says, in words; empty where in nothing."""
    if expected is None:
        return "not in the manifest"
    found = digest(shape, parts, source)
    if expected.shape != found.shape:
        return f"shape {found.shape}, expected {expected.shape}"
    if expected.dtype != found.dtype:
        return f"{found.dtype}, expected {expected.dtype}"
    return "" if expected.sha256 == found.sha256 else "other values"


def refuse_other(path: Path, name: str, fault: str) -> None:
    """Raises WeightsError if a tensor of a file has a fault."""
    if fault:
        raise WeightsError(
            f"{path}: {name}: {fault}; it is not what was written: copy the file again, and `paralign verify` finds "
            "whether others are broken too"
        )
