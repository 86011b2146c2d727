"""Where checkpoints lie: names, the tracker file, completeness, rotation.

<run_dir>/checkpoints/iter_0000100/                 complete: it got its name by a rename, at the very end
                      iter_0000200.part/            being written, or left by a run that died
                      .iter_0000100.aside/          the one before, while a newer one of its step takes its place
                      iter_0000100.broken/          was complete, and is no more what was written
                      latest_checkpointed_iteration.txt
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from paralign.models.errors import CheckpointError

from ..files.whole_file import remove_directory, replace_directory, write_whole
from .config import CheckpointConfig

TRACKER = "latest_checkpointed_iteration.txt"
PROGRESS = "progress.json"
_LEFT = re.compile(r"\.iter_\d{7,}\.aside|\.iter_\d{7,}(\.aside)?\.removed")  # by kills
_NAME = re.compile(r"iter_(\d{7,})|\.iter_(\d{7,})\.aside")


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done; the next one has this number.
        data: fingerprint of samples and packing: the same samples follow only if it is the same.
        metrics: of the last evaluation.
        manifest: the checkpoint has a manifest of its files; those of older versions have none.
        window: what spikes are told by, see `observe/spikes.py`.
        buckets: of a state that goes on at one layout only: what it was saved at, see `training/buckets.py`.
    """

    step: int
    data: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    manifest: bool = False
    window: Sequence[Sequence[float]] = field(default_factory=list)
    buckets: Mapping[str, Any] = field(default_factory=dict)


def directory_of(root: Path, step: int) -> Path:
    """Megatron's name for the checkpoint after so many steps."""
    return root / f"iter_{step:07d}"


def unfinished(directory: Path) -> Path:
    """The name that a checkpoint has while it is written."""
    return directory.with_name(f"{directory.name}.part")


def complete(root: Path, *, at_most: int | None = None) -> list[Path]:
    """Complete checkpoints, oldest first; those after at most so many steps.

    One that was set aside counts where a kill came before the other one had its name.
    """
    if not root.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir(), reverse=True):  # iter_0000100 comes before .iter_0000100.aside
        if _NAME.fullmatch(path.name) and (path / PROGRESS).is_file():
            found.setdefault(_step_of(path), path)
    return [found[step] for step in sorted(found) if at_most is None or step <= at_most]


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint. The tracker file is for people and other tools, and is not needed."""
    return next(reversed(complete(root)), None)


def passed_over(root: Path) -> list[str]:
    """Names of checkpoints that a run left unfinished, or that have lost the file that says how far they are."""
    return sorted(
        path.name
        for path in root.glob("iter_*")
        if path.name.endswith(".part") or (_NAME.fullmatch(path.name) and not (path / PROGRESS).is_file())
    )


def sweep(root: Path) -> None:
    """Remove what saves that were cut off have left; nobody else may be saving here."""
    for path in root.glob("iter_*.part"):
        remove_directory(path)


def set_broken_aside(directory: Path) -> Path:
    """Take a checkpoint's name from it, so that it is not gone on from again; its new name."""
    aside = _free_name(directory, "broken")
    os.rename(directory, aside)
    return aside


def _free_name(directory: Path, what: str) -> Path:
    names = (directory.with_name(f"{directory.name}.{what}{n or ''}") for n in count())
    return next(name for name in names if not name.exists())


def read_progress(directory: Path) -> Progress:
    """Raises CheckpointError where a checkpoint does not say how far it is."""
    path = directory / PROGRESS
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected a finished checkpoint") from None


def write_progress(directory: Path, progress: Progress) -> None:
    text = json.dumps(asdict(progress), indent=2)
    (directory / PROGRESS).write_text(text + "\n", encoding="utf-8")


def publish(directory: Path) -> None:
    """Give a written checkpoint its name, then point the tracker at it.

    A kill at any moment leaves a complete checkpoint of that step, if there was one before.
    """
    if directory.exists() and not (directory / PROGRESS).is_file():
        # Not a checkpoint of ours. It keeps what it holds, and one of ours that was set aside stays until the newer
        # one is there.
        os.rename(directory, _free_name(directory, "other"))
    replace_directory(unfinished(directory), directory)
    write_whole(directory.parent / TRACKER, f"{_step_of(directory)}\n")


def rotate(root: Path, config: CheckpointConfig) -> None:
    """Remove all but the newest `keep_last` and the one where `keep_best` is lowest, and what kills have left."""
    checkpoints = complete(root)
    for path in root.iterdir():
        if _LEFT.fullmatch(path.name) and path not in checkpoints:
            remove_directory(path)
    if config.keep_last is None:
        return
    kept = set(checkpoints[-config.keep_last :])
    if config.keep_best:
        measured = [(read_progress(path).metrics.get(config.keep_best), path) for path in checkpoints]
        ranked = [(value, path) for value, path in measured if value is not None and math.isfinite(value)]
        if ranked:
            kept.add(min(ranked)[1])
    for path in checkpoints:
        if path not in kept:
            remove_directory(path)


def _step_of(directory: Path) -> int:
    match = _NAME.fullmatch(directory.name)
    assert match, directory
    return int(match[1] or match[2])
