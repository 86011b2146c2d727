"""Files of a directory against its manifest: are they what was written?

Whoever writes a directory notes the digest of each file, and `write_file_manifest` puts them into its manifest.json.
`broken_files` checks them, all or a share: ranks that read one directory divide the work with `share_of_files`.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from paralign.models.errors import WeightsError

from .manifest import FileDigest, read_manifest, write_manifest

_AT_ONCE = 2**20  # bytes in memory


def digest_file(path: Path, progress: Callable[[int], None] = lambda count: None) -> FileDigest:
    """Size and SHA-256 of a file, which is read once, 1 MiB at a time.

    What was read stays in the system's page cache, which costs the process nothing: it is about to be loaded, or
    was just written.

    Args:
        progress: told the bytes of each block.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    hasher, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            size += count
            progress(count)
    return FileDigest(size, hasher.hexdigest())


def digest_directory(directory: Path, *, without: Collection[str] = ()) -> dict[str, FileDigest]:
    """The digests of the files below a directory, by name relative to it, but for those named."""
    found = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*"))}
    return {name: digest_file(path) for name, path in found.items() if name not in without and path.is_file()}


def write_file_manifest(directory: Path, digests: Mapping[str, FileDigest], **about: Any) -> None:
    """Writes `manifest.json` of files.

    Args:
        digests: by name relative to the directory, with `/` between folders.
        about: where the files come from, such as `step=100`.
    """
    write_manifest(directory, digests, {}, **about)


def read_file_manifest(directory: Path) -> dict[str, FileDigest] | None:
    """The files that a directory's manifest names; None where there is no manifest.

    Raises:
        WeightsError: it is damaged.
    """
    manifest = read_manifest(directory)
    return None if manifest is None else dict(manifest.files)


def broken_files(
    directory: Path,
    names: Collection[str] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """What is wrong with files of a directory, a line for each file; empty where all is as it was written.

    Where there is no manifest, nothing is known and nothing is wrong: `read_file_manifest` tells. Files that it does
    not name may be there.

    Args:
        names: those to check; None checks all. A name that the manifest lacks is passed over.
        progress: told the bytes of each block that was read.
    """
    try:
        manifest = read_file_manifest(directory)
    except WeightsError as error:
        return [str(error).removeprefix(f"{directory}/")]
    faults = []
    for name, expected in (manifest or {}).items():
        if (names is None or name in names) and (fault := file_fault(directory / name, expected, progress)):
            faults.append(f"{name}: {fault}")
    return faults


def file_fault(
    path: Path, expected: FileDigest, progress: Callable[[int], None] = lambda count: None
) -> str | None:
    """What is wrong with one file, in words; None where it is as it was written. A wrong size is told unread."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "not a file"
        if status.st_size != expected.bytes:
            return f"{status.st_size:,} bytes, expected {expected.bytes:,}"
        return None if digest_file(path, progress) == expected else "other content"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def share_of_files(digests: Mapping[str, FileDigest], rank: int, n_ranks: int) -> list[str]:
    """The names that one rank checks, so that all read about the same number of bytes; each name once over all."""
    return share_by_size({name: digest.bytes for name, digest in digests.items()}, rank, n_ranks)


def share_by_size(sizes: Mapping[str, int], rank: int, n_ranks: int) -> list[str]:
    """One rank's share of names, the largest first to whoever has least; the same on every rank."""
    loads = [0] * n_ranks
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        if least == rank:
            mine.append(name)
    return mine
