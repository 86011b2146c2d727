"""Bytes of a file: mapped into memory to be read, and written by threads of their own.

A process that reads a mapped page of a file that was cut meanwhile dies by SIGBUS, at no place that an error could
name. So whatever goes through a tensor block by block reads each block into memory of its own. Slices of a model
that is loaded are read from the mapping; there a look at the file tells before and after what has changed.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from paralign.models.errors import WeightsError

from ..files.stretch import read_stretch

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python has the name from 3.13 on
FLUSH_BYTES = 2**28  # what may wait for the disk: little is left to wait for when the file is closed
HELD_BYTES = 2**28  # of mapped files may be in memory for each worker before they are let go of


class MappedBytes:
    """A file's bytes as tensors: a slice of one reads from disk what it covers.

    Attributes:
        first: address of the first byte.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._state = _state(os.fstat(self._file.fileno()))
        # Copy-on-write, because torch has no read-only tensors: a stray write stays out of the file.
        # Without reserve, or a file larger than the memory could not be mapped.
        self._bytes = mmap.mmap(self._file.fileno(), 0, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
        self.first = torch.frombuffer(self._bytes, dtype=torch.uint8).data_ptr()

    def tensor(self, offset: int, dtype: torch.dtype, count: int) -> Tensor:
        """`count` elements from byte `offset`, flat and lazy; raises WeightsError if the file has changed."""
        self.check()
        try:
            return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset)
        except ValueError:  # it was cut between a look at its header and this one
            raise _changed(self._path) from None

    def own(self, block: Tensor) -> Tensor:
        """The block in memory of its own, where it is a stretch of this file; else the block.

        Raises:
            WeightsError: the file has changed since it was opened, or can no longer be read.
        """
        at = block.data_ptr() - self.first
        if not (0 <= at < len(self._bytes) and block.is_contiguous()):
            return block
        copy = torch.empty_like(block)
        buffer = raw(copy)
        try:
            whole = read_stretch(self._file.fileno(), buffer, at) == len(buffer)
        except OSError as error:
            raise WeightsError(
                f"{self._path}: can no longer be read ({error}); mend the disk, start again"
            ) from None
        if not whole:
            raise _changed(self._path)
        self.check()
        return copy

    def check(self) -> None:
        """Raises WeightsError if the file is not the one that was opened, as far as size and times say."""
        try:
            found = _state(self._path.stat())
        except OSError:
            raise _changed(self._path) from None
        if found != self._state:
            raise _changed(self._path)

    def release(self) -> None:
        """Drops the pages that reading has brought into memory; tensors stay valid and read them again.

        Raises:
            WeightsError: what was read may have changed meanwhile.
        """
        self._bytes.madvise(mmap.MADV_DONTNEED)
        self.check()


class Mapped(Protocol):
    """What tensors are read from."""

    def own(self, block: Tensor) -> Tensor:
        """The block in memory of its own, where it is mapped; raises WeightsError if the file has changed."""

    def release(self) -> None:
        """Drops the pages that reading has brought into memory; raises WeightsError as `own`."""


class MappedFiles:
    """Several files, any of which a block may be of."""

    def __init__(self, files: Iterable[MappedBytes]) -> None:
        self._files = sorted(files, key=lambda file: file.first)
        self._firsts = [file.first for file in self._files]

    def own(self, block: Tensor) -> Tensor:
        i = bisect_right(self._firsts, block.data_ptr())
        return self._files[i - 1].own(block) if i else block

    def check(self) -> None:
        """Raises WeightsError if any has changed."""
        for file in self._files:
            file.check()

    def release(self) -> None:
        for file in self._files:
            file.release()


def lightly(pieces: Iterator[tuple[Tensor, ...]], *sources: Mapped) -> Iterator[tuple[Tensor, ...]]:
    """The pieces, in memory of their own; what was read for them does not stay there, however large the tensor."""
    held = 0
    for piece in pieces:
        for source in sources:
            piece = tuple(source.own(block) for block in piece)
        yield piece
        held += sum(tensor.nbytes for tensor in piece)
        if held >= HELD_BYTES:
            held = 0
            for source in sources:
                source.release()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in its memory."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


class Behind:
    """Runs calls in order on one thread; `submit` waits until the previous call has finished."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[Any] | None = None

    def submit(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Raises what the call before has raised."""
        previous, self._last = self._last, self._thread.submit(call, *arguments)
        if previous is not None:
            previous.result()

    def wait(self) -> None:
        """Returns when all is done; raises what the last call has raised."""
        if self._last is not None:
            self._last.result()


class WriteBehind:
    """Writes a file in the background. Do not reuse a buffer until the next `write` has returned.

    Another thread flushes every 256 MB, so that the disk works all the time and not only at the end. It is file
    enough for `zipfile`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._writer, self._flusher = Behind(), Behind()
        self._at = self._unflushed = 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> int:
        self._at = offset
        return offset

    def flush(self) -> None:
        """Nothing is kept back that `close` would not wait for."""

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._writer.submit(self._put, view, self._at)
        self._at += len(view)
        self._unflushed += len(view)
        if self._unflushed >= FLUSH_BYTES:
            self._flusher.submit(os.fsync, self._file.fileno())
            self._unflushed = 0
        return len(view)

    def close(self) -> None:
        """Returns when the bytes are on disk, so that a rename afterwards never shows a torn file."""
        self._writer.wait()
        self._flusher.wait()
        os.fsync(self._file.fileno())
        self._file.close()

    def _put(self, view: memoryview, at: int) -> None:
        while view:
            count = os.pwrite(self._file.fileno(), view, at)
            view, at = view[count:], at + count


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _changed(path: Path) -> WeightsError:
    return WeightsError(f"{path}: changed while it was read; let nothing write to it, and start again")
