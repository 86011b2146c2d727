"""The checkpoint that a run goes on from: the newest that is as it was written.

Rank 0 says which there are and what their manifests hold, and has the last word on a file: ranks that see other names
or bytes, as through the cache of a network file system, must not go on from another checkpoint than the rest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paralign.models.errors import CheckpointError, ParalignError

from ..checkpoint import store
from ..checkpoint.file_manifest import broken_files, file_fault, read_file_manifest, share_of_files
from ..checkpoint.manifest import MANIFEST, FileDigest
from ..parallel.mesh import Mesh

TRIES, PAUSE_SECONDS = 3, 1.0  # before a file counts as one that cannot be read


@dataclass(frozen=True)
class Found:
    """Attributes: names of those that are not finished, and of newer ones that are broken, with what is wrong."""

    newest: Path | None
    passed_over: Sequence[str]
    broken: Sequence[str] = ()


def newest_whole(root: Path, mesh: Mesh, *, at_most: int | None, set_aside: bool) -> Found:
    """The newest checkpoint of a run that is as it was written. Collective.

    Args:
        at_most: leaves out those after more steps.
        set_aside: give newer ones that are broken another name.

    Raises:
        CheckpointError: there are some, and none is whole; or a rank cannot read one. Then none is renamed.
    """
    found, left = mesh.from_main(lambda: (store.complete(root, at_most=at_most), store.passed_over(root)))
    faults: dict[Path, list[str]] = {}
    newest = None
    for directory in reversed(found):
        if not (wrong := broken(directory, mesh)):
            newest = directory
            break
        faults[directory] = wrong
    told = [f"{directory.name} ({'; '.join(wrong[:3])})" for directory, wrong in faults.items()]
    if faults and newest is None:
        raise CheckpointError(
            f"{root}: no checkpoint is as it was written: {', '.join(told)}; restore one from a copy, or choose "
            "another run_dir to start over"
        )
    if set_aside and faults:
        mesh.from_main(lambda: [store.set_broken_aside(directory) for directory in faults])
    return Found(newest, left, told)


def broken(directory: Path, mesh: Mesh) -> list[str]:
    """The files of a checkpoint that are not as they were written, in words; each rank reads a share. Collective.

    Of a checkpoint from before there were manifests nothing is known, and nothing is wrong.

    Raises:
        CheckpointError: a rank cannot read a file, or sees other bytes of it than rank 0.
    """
    expected, damage = mesh.from_main(lambda: _manifest(directory))
    if damage:
        return [damage]
    mine = _faults_of(
        directory, {name: expected[name] for name in share_of_files(expected, mesh.rank, mesh.world_size)}
    )
    said = mesh.gather(mine)
    suspects = {name: (rank, fault) for rank, faults in enumerate(said) for name, fault in faults.items()}
    if not suspects:
        return []
    confirmed = mesh.from_main(lambda: broken_files(directory, suspects))
    sure = {words.partition(": ")[0] for words in confirmed if ": cannot be read" not in words}
    if unsure := [name for name in suspects if name not in sure]:
        rank, fault = suspects[unsure[0]]
        raise CheckpointError(
            f"{directory}/{unsure[0]}: rank {rank} finds: {fault}, and rank 0 does not; look at the file system of "
            "that rank's node and start the run again; no checkpoint was renamed"
        )
    return confirmed


def _manifest(directory: Path) -> tuple[Mapping[str, FileDigest], str]:
    """What a checkpoint's manifest says, nothing for one without; and what is wrong with it, in words."""
    try:
        (
            directory / store.PROGRESS
        ).read_bytes()  # a file that cannot be read is another thing than a damaged one
        expected = read_file_manifest(directory)
        if expected is None and store.read_progress(directory).manifest:
            return {}, f"{MANIFEST}: missing"
    except ParalignError as error:
        return {}, str(error)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error}); start the run again") from None
    return expected or {}, ""


def _faults_of(directory: Path, digests: Mapping[str, FileDigest]) -> dict[str, str]:
    """What is wrong with files, in words by name; a file is looked at again before anything is said of it."""
    found: dict[str, str] = {}
    for name, digest in digests.items():
        for attempt in range(TRIES):
            if not (fault := file_fault(directory / name, digest)):
                break
            if attempt + 1 < TRIES:
                time.sleep(PAUSE_SECONDS)
        else:
            found[name] = fault or ""
    return found
