"""Files of torch's distributed checkpoints: tensors read one at a time, and written one after another.

Owns the format, not what the tensors mean. Training saves and loads through megatron-core (native.py); this
reads and writes the same files where there is no process group, with one tensor in memory.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from paralign.models.errors import CheckpointError
from paralign.models.weights import Shape

METADATA = ".metadata"


class Stretch(NamedTuple):
    """Where a tensor lies: file name, first byte, number of bytes."""

    file: str
    offset: int
    length: int


class CheckpointFiles:
    """The tensors of a checkpoint by name, whole, on the CPU.

    Attributes:
        stored: shape, dtype and pieces of every tensor.

    Raises:
        CheckpointError: no metadata, or a file that is missing or cut off.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            with warnings.catch_warnings(action="ignore"):
                metadata = FileSystemReader(directory).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{directory / METADATA}: cannot be read ({error}); copy the checkpoint again"
            ) from None
        self._storage: Mapping[MetadataIndex, Any] = metadata.storage_data
        ends: dict[str, int] = {}
        for item in self._storage.values():
            ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
        for file, end in ends.items():
            path = directory / file
            size = path.stat().st_size if path.exists() else 0
            if size < end:
                raise CheckpointError(
                    f"{path}: {size} bytes, .metadata says {end}; copy the checkpoint again"
                )
        self.files = [directory / file for file in sorted(ends)]
        self.stored: dict[str, TensorStorageMetadata] = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """The whole tensor, put together from the pieces that ranks have saved."""
        stored = self.stored[name]
        whole = None
        for chunk in stored.chunks:
            item = self._storage[MetadataIndex(name, chunk.offsets)]
            with (self._directory / item.relative_path).open("rb") as file:
                piece = torch.load(_View(file, item.offset, item.length), weights_only=True).detach()
            if tuple(piece.shape) == tuple(stored.size):
                return piece
            if whole is None:
                whole = torch.empty(stored.size, dtype=stored.properties.dtype)
            target = whole
            for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
                target = target.narrow(dim, start, size)
            target.copy_(piece)
        assert whole is not None
        return whole


class CheckpointFileWriter:
    """Writes whole tensors into one file; `stretches` says where each has come to lie."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self.stretches: dict[str, Stretch] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        start = self._file.tell()
        torch.save(tensor.detach().contiguous(), self._file)
        self.stretches[name] = Stretch(self._path.name, start, self._file.tell() - start)

    def close(self) -> None:
        """Returns when the bytes are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def write_metadata(
    directory: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, stretches: Mapping[str, Stretch]
) -> None:
    """Makes a checkpoint of files of whole tensors; the last thing to be written."""
    offsets = {name: torch.Size([0] * len(shape)) for name, shape in shapes.items()}
    metadata = Metadata(
        state_dict_metadata={
            name: TensorStorageMetadata(
                TensorProperties(dtype=dtype),
                torch.Size(shape),
                [ChunkStorageMetadata(offsets[name], torch.Size(shape))],
            )
            for name, shape in shapes.items()
        },
        storage_data={MetadataIndex(name, offsets[name]): _StorageInfo(*stretches[name]) for name in shapes},
        version="1.0.0",
    )
    temporary = directory / f"{METADATA}.part"
    temporary.write_bytes(pickle.dumps(metadata))
    os.replace(temporary, directory / METADATA)


class _View(io.RawIOBase):
    """`length` bytes of an open file from `start`, as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._start + self._at)
        wanted = max(0, min(len(buffer), self._length - self._at))
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._at += count
        return count
