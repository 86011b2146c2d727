"""One safetensors file: its header, its tensors, writing in any order.

The format is 8 bytes of header length, a JSON header, then the tensors' bytes without holes. It is read and
written here, and not by the safetensors package, for two reasons: a directory is checked by its headers
alone, and tensors are written straight to their place, so that no shard is ever held in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paralign.models.errors import WeightsError
from paralign.models.weights import Shape, Views

from ..files.json_file import MOST_BYTES, parse_json
from .rawfile import MappedBytes, WriteBehind, raw

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: dtype in the format's word, shape, and its bytes `start:stop` of the file."""

    dtype: str
    shape: Shape
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors that a file holds, by name; reads the header and the file's size, no tensor.

    Raises:
        WeightsError: the file is not there, not in the format, or of another size than its header says; its tensors
            overlap, or leave holes.
    """
    if path.exists() and not path.is_file():  # a pipe would be read for ever
        raise WeightsError(f"{path}: not a file; download it again")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if length <= min(size - 8, MOST_BYTES) else b""
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such file; download it again") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); download it again") from None
    base = 8 + length
    try:
        header = parse_json(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(base, **tensor) for name, tensor in header.items()}
    except (ValueError, TypeError, AttributeError):
        raise WeightsError(
            f"{path}: {size} bytes, no safetensors header; cut off, or a Git LFS pointer (git lfs pull)?"
        ) from None
    promised = max((entry.stop for entry in entries.values()), default=base)
    at = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if not at == entry.start <= entry.stop:
            raise WeightsError(
                f"{path}: {name} has bytes {entry.start - base} to {entry.stop - base}, where the next begin at "
                f"{at - base}: tensors overlap, or leave a hole; download it again"
            )
        at = entry.stop
    if size != promised:
        raise WeightsError(f"{path}: {size} bytes, its header says {promised}; download it again")
    for name, entry in entries.items():
        dtype = DTYPES.get(entry.dtype)
        if dtype and entry.stop - entry.start != math.prod(entry.shape) * dtype.itemsize:
            raise WeightsError(
                f"{path}: {name} of shape {entry.shape} does not fit its bytes; download it again"
            )
    return entries


def _entry(base: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    """Raises TypeError or ValueError for what is not one, of a file whose tensors begin at byte `base`."""
    start, stop = data_offsets
    numbers = (start, stop, *shape)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) > 16:
        raise ValueError
    if not isinstance(dtype, str) or len(dtype) > 16:
        raise ValueError
    return Entry(dtype, tuple(shape), base + start, base + stop)


class MappedFile:
    """Tensors of one file, mapped into memory: a slice of one reads from disk what it covers.

    Attributes:
        bytes: those of the file.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self._entries = path, entries
        self.bytes = MappedBytes(path)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, lazily; its dtype must be one of `DTYPES`."""
        entry = self._entries[name]
        flat = self.bytes.tensor(entry.start, DTYPES[entry.dtype], math.prod(entry.shape))
        return flat.view(entry.shape)


class TensorFileWriter:
    """Writes tensors of known names and shapes, one dtype, in any order."""

    def __init__(self, path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._dtype = dtype
        header, self._starts, self.size = file_layout(shapes, dtype)
        self.missing = set(shapes)
        self._file = WriteBehind(path)
        self._file.write(header)
        self.close = self._file.close

    def write(self, name: str, parts: Views) -> None:
        """Writes a tensor of the file's dtype; raises ValueError if it is another one or of another size."""
        if name not in self.missing:
            raise ValueError(f"{name} is written twice")
        self._file.seek(self._starts[name])
        for part in parts:
            if part.dtype != self._dtype:
                raise ValueError(f"{name} is {part.dtype}, the file {self._dtype}")
            self._file.write(raw(part))
        if self._file.tell() != self._starts[name] + math.prod(self._shapes[name]) * self._dtype.itemsize:
            raise ValueError(f"{name} does not have {self._shapes[name]} elements")
        self.missing.discard(name)


def file_layout(shapes: Mapping[str, Shape], dtype: torch.dtype) -> tuple[bytes, dict[str, int], int]:
    """Header, each tensor's first byte and the file's size; a pure function, the same on every rank."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for name, shape in shapes.items():
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, stop]}
        starts[name], at = at, stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as other readers like it
    base = 8 + len(text)
    return (
        len(text).to_bytes(8, "little") + text,
        {name: base + start for name, start in starts.items()},
        base + at,
    )
