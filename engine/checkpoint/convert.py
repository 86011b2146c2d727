"""From one form of a model on disk to another.

Needs no process group, no GPU and no megatron-core.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .source import ModelSource, open_source
from .writing import Kind, Report, WriteOptions, dtype_named, refuse_unless_empty, write_model


def convert(
    src: Path,
    dst: Path,
    *,
    to: Kind | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = True,
    workers: int = 1,
    progress: bool = True,
) -> Report:
    """Writes the model in `src` as a Hugging Face directory or as a native checkpoint, with a manifest.

    Args:
        src: a Hugging Face directory, or a finished checkpoint, `…/iter_0000100`.
        dst: absent or empty.
        to: None takes the other kind than that of `src`.
        dtype: float32, bfloat16 or float16; None keeps that of `src`.
        max_shard_size, verify, workers, progress: see `WriteOptions`.

    Raises:
        CheckpointError, WeightsError: `src` cannot be read as stated, is not what its manifest or, in a native
            checkpoint, its CRC32 sums say, or as `write_model` says.
    """
    refuse_unless_empty(dst)
    named = None if dtype is None else dtype_named(dtype)
    source = open_source(src)
    options = WriteOptions(
        kind=to or ("native" if source.kind == "hf" else "hf"),
        dtype=source.dtype() if named is None else named,
        max_shard_size=max_shard_size,
        verify=verify,
        workers=workers,
        progress=progress,
    )

    about = {"source": str(src.resolve())}
    identity = {**about, "state": state_of(source)}
    return write_model(source, dst, options, identity=identity, about=lambda _: about)


def state_of(source: ModelSource) -> str:
    """A hash that changes when a file of weights does, by size and time of change."""
    states = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in (*source.files, source.assets / "config.json")
    ]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()
