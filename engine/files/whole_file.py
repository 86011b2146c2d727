"""Files and directories that are there whole or not at all, after a kill and after a power cut.

What is to be there is written under another name, brought to the disk, and renamed. Disks keep neither a file's
bytes nor a directory's names in order by themselves: without fsync a rename can outlive the bytes it stands for.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file at once: whoever reads it meets the old content or the new; text is UTF-8."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written beside `path`, which takes its name when the body has ended without an error."""
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync(path.parent)


def name_directory(finished: Path, directory: Path) -> None:
    """Give a finished directory its name, which nothing has, or an empty directory; OSError otherwise."""
    sync_tree(finished)
    os.replace(finished, directory)
    sync(directory.parent)


def replace_directory(finished: Path, directory: Path) -> None:
    """Give a finished directory its name, in place of an older one.

    At every moment one of the two is there whole: from just before the rename until it is removed, the older one has
    the name `set_aside(directory)`.
    """
    sync_tree(finished)
    aside = set_aside(directory)
    if directory.exists():
        if aside.exists():  # of a run that was killed after the rename
            remove_directory(aside)
        os.replace(directory, aside)
    os.replace(finished, directory)
    sync(directory.parent)
    if aside.exists():
        remove_directory(aside)


def set_aside(directory: Path) -> Path:
    """The name that a directory has while another one takes its place; hidden, so that it is nobody else's."""
    return directory.with_name(f".{directory.name}.aside")


def remove_directory(directory: Path) -> None:
    """Remove a directory, or a link to one; what is left where that is cut short is called `.NAME.removed`."""
    if directory.is_symlink():
        directory.unlink()
        return
    doomed = directory.with_name(f".{directory.name.strip('.').removesuffix('.removed')}.removed")
    if doomed != directory:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what a file system holds on to is removed another time


def sync_tree(directory: Path) -> None:
    """Return when all that a directory holds is on the disk."""
    for here, _, files in os.walk(directory):
        for name in files:
            sync(Path(here, name))
        sync(Path(here))


def sync(path: Path) -> None:
    """Return when a file's bytes, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing for directories
            raise
    finally:
        os.close(descriptor)
