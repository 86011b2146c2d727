"""What a file system refuses, as an error that names the place and the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paralign.models.errors import ParalignError, TrainingError

_REMEDIES = {
    errno.ENOSPC: "make room there and start the run again",
    errno.EDQUOT: "make room in the quota and start the run again",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "name a place that you may write",
    errno.EPERM: "name a place that you may write",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a file stands where a directory is expected; move it, or name another place",
    errno.EEXIST: "a file stands where a directory is expected; move it, or name another place",
    errno.EISDIR: "a directory stands where a file is expected; move it, or name another place",
    errno.ELOOP: "the links lead in a circle; name the directory itself",
}


@contextmanager
def refusals_told(place: Path, error: type[ParalignError] = TrainingError) -> Iterator[None]:
    """An OSError in the body becomes one `error`: the file, what is wrong, the remedy.

    Args:
        place: named where the system does not say which file it is, as of a write to a full disk.
    """
    try:
        yield
    except ConnectionError:  # of other ranks, not of a file system
        raise
    except OSError as refused:
        raise error(refusal(refused, place)) from refused


def refusal(refused: OSError, place: Path) -> str:
    """The same in words."""
    named = str(refused.filename or place)
    if len(named) > 200:
        named = f"{named[:197]}…"
    remedy = _REMEDIES.get(refused.errno or 0, "look at that file system")
    return f"{named}: {refused.strerror or refused}; {remedy}"


def told(error: Exception) -> Exception:
    """The same, or what a full, closed or read-only file system says as an error that the user can mend."""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return TrainingError(refusal(error, Path("a file that the system does not name")))
    return error


def check_writable(directory: Path, error: type[ParalignError]) -> None:
    """Raise `error` if a directory can be neither written nor made; makes nothing itself."""
    with refusals_told(directory, error):
        here = directory.absolute()
        while not _is_there(here):
            here = here.parent
        if not here.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(here))
        if not os.access(here, os.W_OK | os.X_OK):
            read_only = os.statvfs(here).f_flag & os.ST_RDONLY
            number = errno.EROFS if read_only else errno.EACCES
            raise OSError(number, os.strerror(number), str(here))


def _is_there(path: Path) -> bool:
    """Also a link that leads nowhere, and never a guess: what is wrong with a name is raised."""
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise FileNotFoundError(errno.ENOENT, "a link that leads nowhere", str(path)) from None
        return False
    return True
