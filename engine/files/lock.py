"""A directory that belongs to one process: whoever comes second is told who has it.

The lock is a POSIX record lock (`fcntl.lockf`), which the system keeps for a process, not for a file descriptor:
children that are forked or spawned do not inherit it, and it is gone with the process, after a kill −9 too. The file
stays; it only says who came last. On NFS the server keeps it: of a node that is lost, until the server notices
(NFSv4: about 90 seconds).

Such a lock ends when its process closes any descriptor of the file. Nobody but this room opens it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paralign.models.errors import TrainingError

from .refused import refusals_told

LOCK = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # Lustre without -o flock, some FUSE


@contextmanager
def locked(directory: Path, *, patience: float = 10.0) -> Iterator[None]:
    """Keep a directory for this process while the body runs; make it where it is not there.

    Args:
        patience: seconds to wait for another process, which may just be ending.

    On a file system that has no locks it says so on stderr, and goes on.

    Raises:
        TrainingError: another process has it, or it cannot be written.
    """
    path = directory / LOCK
    with refusals_told(path):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with refusals_told(path):
            if not _take(descriptor, directory, patience):
                print(
                    f"{directory}: no locks on this file system; keep a second run out of it", file=sys.stderr
                )
            holder = json.dumps(_this_process()).encode() + b"\n"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder, 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, directory: Path, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as refused:
            if refused.errno in _NO_LOCKS:
                return False
            if refused.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > deadline:
            raise TrainingError(
                f"run_dir {directory}: in use by {_holder(descriptor)}; wait for its end, or give another run_dir"
            )
        time.sleep(0.1)


def _this_process() -> dict[str, str | int]:
    job = os.environ.get("SLURM_JOB_ID", "")
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": since}


def _holder(descriptor: int) -> str:
    try:
        said = json.loads(os.pread(descriptor, 4096, 0))
        job = f", SLURM job {said['job']}" if said["job"] else ""
        return f"process {said['pid']} on {said['host']}{job}, since {said['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
