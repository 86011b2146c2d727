"""A stretch of an open file, read into memory wherever the file stands."""

from __future__ import annotations

import os


def read_stretch(descriptor: int, buffer: memoryview, at: int) -> int:
    """Fill a buffer of bytes from byte `at` on, in as many reads as that takes.

    Returns:
        The bytes read: fewer than the buffer has where the file ends before.

    Raises:
        OSError: it cannot be read.
    """
    done = 0
    while done < len(buffer) and (n_bytes := os.preadv(descriptor, [buffer[done:]], at + done)):
        done += n_bytes
    return done
