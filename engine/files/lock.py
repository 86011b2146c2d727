"""A directory that belongs to one process: whoever comes second is told who has it.

The lock is a POSIX record lock (`fcntl.lockf`), which the system keeps for a process, not for a file descriptor:
children that are forked or spawned do not inherit it, and it is gone with the process, after a kill −9 too. The file
stays; it only says who came last. On NFS the server keeps it: of a node that is lost, until the server notices
(NFSv4: about 90 seconds). A run that SLURM or torchrun starts again after that node waits for longer than that.

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
JUST_ENDING = 10.0  # seconds to wait for a process of this node
NODE_LOST = 120.0  # and for one whose node may be lost
_RESTARTERS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # Lustre without -o flock, some FUSE


@contextmanager
def locked(directory: Path, *, patience: float | None = None) -> Iterator[None]:
    """Keep a directory for this process while the body runs; make it where it is not there.

    Args:
        patience: seconds to wait for another process, which may just be ending. None takes `JUST_ENDING`, or
            `NODE_LOST` where SLURM or torchrun has started this one, or the other is on another host.

    A line on stderr says at once for whom it waits. On a file system that has no locks it says so there, and goes on.

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


def _take(descriptor: int, directory: Path, patience: float | None) -> bool:
    began, waits = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as refused:
            if refused.errno in _NO_LOCKS:
                return False
            if refused.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        other = _holder(descriptor)
        who = f"run_dir {directory}: in use by {_described(other)}"
        restarted = any(name in os.environ for name in _RESTARTERS)
        far = other.get("host", socket.gethostname()) != socket.gethostname()
        longest = (NODE_LOST if restarted or far else JUST_ENDING) if patience is None else patience
        if time.monotonic() > began + longest:
            raise TrainingError(f"{who}; wait for its end, or give another run_dir")
        if not waits:
            print(f"{who}; waiting for its end, {longest:.0f} s at most", file=sys.stderr, flush=True)
            waits = True
        time.sleep(0.1)


def _this_process() -> dict[str, str | int]:
    job = os.environ.get("SLURM_JOB_ID", "")
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": since}


def _holder(descriptor: int) -> dict[str, str | int]:
    """What the process that has it says of itself; empty if nothing that can be read."""
    try:
        said = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _described(said: dict[str, str | int]) -> str:
    try:
        job = f", SLURM job {said['job']}" if said["job"] else ""
        return f"process {said['pid']} on {said['host']}{job}, since {said['since']}"
    except KeyError:
        return "another process"
