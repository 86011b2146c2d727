"""Whether the files of a directory are what was written: their sizes and SHA-256, in a file beside them.

    checksums.json   {"block": bytes, "files": {name: [size, digest]}}

Files are read in blocks, by several threads at once: the digest of a file is that of the digests of its blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .whole_file import write_whole

CHECKSUMS = "checksums.json"
BLOCK = 1 << 25
THREADS = 8  # one does 1 to 2 GB/s, less than a fast disk gives


def write_checksums(directory: Path, names: Sequence[str]) -> None:
    """Notes what files of a directory hold now; raises OSError."""
    digests = _digests(directory, names, BLOCK)
    files = {name: [(directory / name).stat().st_size, digest] for name, digest in zip(names, digests)}
    write_whole(directory / CHECKSUMS, json.dumps({"block": BLOCK, "files": files}, indent=1) + "\n")


def has_checksums(directory: Path) -> bool:
    """Whether the files of a directory can be checked."""
    return (directory / CHECKSUMS).is_file()


def broken_file(directory: Path) -> str | None:
    """What is wrong with the first file that is not as it was written; None where all are.

    Sizes are compared first, so that a file that was cut is found without reading.
    """
    try:
        noted = json.loads((directory / CHECKSUMS).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in noted["files"].items()}
        block = int(noted["block"])
        for name, (size, _) in files.items():
            if (n_bytes := (directory / name).stat().st_size) != size:
                return f"{name} has {n_bytes:,} bytes where {size:,} were written"
        for (name, (_, digest)), found in zip(files.items(), _digests(directory, list(files), block)):
            if found != digest:
                return f"{name} holds other bytes than were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        return f"it cannot be checked ({error})"
    return None


def _digests(directory: Path, names: Sequence[str], block: int) -> list[str]:
    """The digest of each file."""
    n_blocks = [-(-(directory / name).stat().st_size // block) for name in names]
    tasks = [(directory / name, i * block) for name, n in zip(names, n_blocks) for i in range(n)]

    def of_block(task: tuple[Path, int]) -> bytes:
        path, start = task
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            sha, left, buffer = hashlib.sha256(), block, memoryview(bytearray(min(block, 1 << 20)))
            while left and (n := file.readinto(buffer[: min(left, len(buffer))])):
                sha.update(buffer[:n])
                left -= n
            return sha.digest()

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        found = iter(list(pool.map(of_block, tasks)))
    return [hashlib.sha256(b"".join(next(found) for _ in range(n))).hexdigest() for n in n_blocks]
