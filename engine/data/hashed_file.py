"""Data files that are hashed as they are read: what became tokens is what the digest stands for."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from paralign.models.errors import DataError

Digests = Mapping[Path, bytes]  # SHA-256 of each file, as it was when the name of its cache was found
_AT_ONCE = 1 << 20


class _Hashed(io.RawIOBase):
    """A file that is read from beginning to end, and hashed meanwhile."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = cast(io.FileIO, file)
        self.sha = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        n = self._file.readinto(buffer) or 0
        self.sha.update(memoryview(buffer)[:n])
        return n


@contextmanager
def in_order(path: Path, digests: Digests | None) -> Iterator[BinaryIO]:
    """A file to be read from beginning to end.

    Raises:
        DataError: at the end, if what was read is not what `digests` says of it.
    """
    with path.open("rb", buffering=0) as file:
        if digests is None:
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, file), _AT_ONCE))
            return
        hashed = _Hashed(file)
        buffered = io.BufferedReader(hashed, _AT_ONCE)
        yield cast(BinaryIO, buffered)
        while buffered.read(_AT_ONCE):  # what nobody asked for
            pass
        _compare(path, hashed.sha.digest(), digests)


@contextmanager
def anywhere(path: Path, digests: Digests | None) -> Iterator[BinaryIO]:
    """A file to be read here and there. It is hashed afterwards: the file that was opened, whatever has its name.

    Raises:
        DataError: at the end, if it is not what `digests` says of it.
    """
    with path.open("rb") as file:
        yield file
        if digests is not None:
            file.seek(0)
            _compare(path, hashlib.file_digest(file, "sha256").digest(), digests)


def _compare(path: Path, found: bytes, digests: Digests) -> None:
    if found != digests[path]:
        raise DataError(f"{path}: changed while it was tokenised; let nothing write to it, and start again")
