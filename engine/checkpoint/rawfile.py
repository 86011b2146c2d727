"""Bytes of a file: mapped into memory to be read, and written by threads of their own."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python has the name from 3.13 on
FLUSH_BYTES = 2**28  # what may wait for the disk: little is left to wait for when the file is closed
HELD_BYTES = 2**28  # of mapped files may be in memory for each worker before they are let go of


class MappedBytes:
    """A file's bytes as tensors: a slice of one reads from disk what it covers."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Copy-on-write, because torch has no read-only tensors: a stray write stays out of the file.
            # Without reserve, or a file larger than the memory could not be mapped.
            self._bytes = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)

    def tensor(self, offset: int, dtype: torch.dtype, count: int) -> Tensor:
        """`count` elements from byte `offset`, flat and lazy."""
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset)

    def release(self) -> None:
        """Drops the pages that reading has brought into memory; tensors stay valid and read them again."""
        self._bytes.madvise(mmap.MADV_DONTNEED)


def lightly(
    pieces: Iterator[tuple[Tensor, ...]], *releases: Callable[[], None]
) -> Iterator[tuple[Tensor, ...]]:
    """The pieces; what was read for them does not stay in memory, however large the tensor."""
    held = 0
    for piece in pieces:
        yield piece
        held += sum(tensor.nbytes for tensor in piece)
        if held >= HELD_BYTES:
            held = 0
            for release in releases:
                release()


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
