"""manifest.json: what the files and tensors of a directory were when they were written.

    {"format": 2, …where it comes from…,
     "files":   {"config.json": {"bytes": 689, "sha256": "…"}},
     "fingerprint": "…", "tensors": {"model.norm.weight": {"shape": [4096], "dtype": "bfloat16", "sha256": "…"}}}

A model's weights are held by tensor: the digests are of their bytes, little-endian and contiguous, so that they do
not depend on shards, and one tensor can be checked when it is read. Its other files, and all those of a run's
checkpoint, are held by file. Format 1 had tensors only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from paralign.models.errors import WeightsError

from ..files.json_file import json_text, read_json
from ..files.whole_file import write_whole

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class FileDigest:
    """One file: its size in bytes, SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Digest:
    """One tensor: shape, dtype (`bfloat16`), SHA-256 in hexadecimal."""

    shape: list[int]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest holds.

    Attributes:
        files: by name relative to the directory.
        tensors: by the name that they have on disk.
    """

    files: Mapping[str, FileDigest]
    tensors: Mapping[str, Digest]


def fingerprint(digests: Mapping[str, Digest]) -> str:
    """One hash for a whole model, whatever the order of its tensors."""
    text = json.dumps({name: asdict(digests[name]) for name in sorted(digests)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(
    directory: Path, files: Mapping[str, FileDigest], tensors: Mapping[str, Digest], **about: Any
) -> None:
    """Writes `manifest.json`; `about` says where the content comes from."""
    content = {
        "format": FORMAT,
        **about,
        "files": {name: asdict(entry) for name, entry in files.items()},
    }
    if tensors:
        content["fingerprint"] = fingerprint(tensors)
        content["tensors"] = {name: asdict(entry) for name, entry in tensors.items()}
    write_whole(directory / MANIFEST, json_text(content, indent=1))


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory; None where there is none, or only another program's of that name.

    Raises:
        WeightsError: it is damaged.
    """
    path = directory / MANIFEST
    try:
        content = read_json(path)
        keys = {"format", "files", "fingerprint", "tensors"}
        if isinstance(content, dict) and not keys & content.keys():
            return None
        version, tensors = content["format"], _entries(content.get("tensors", {}), Digest)
        if version not in (1, FORMAT):
            raise ValueError(f"format {version!r}, where 1 and {FORMAT} are known")
        files = {} if version == 1 else _entries(content["files"], FileDigest)
        # A damaged key or digest must not pass for one that was never there.
        has_tensors = version == 1 or {"fingerprint", "tensors"} & content.keys()
        if has_tensors and content["fingerprint"] != fingerprint(tensors):
            raise ValueError("its tensors are not those of its fingerprint")
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name:
                raise ValueError(f"{name!r} leads out of the directory")
        return Manifest(files, tensors)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path}: not a manifest ({error}); copy the directory again, or remove this file if another program "
            "wrote it"
        ) from None


Entry = TypeVar("Entry", FileDigest, Digest)


def _entries(content: Any, kind: type[Entry]) -> dict[str, Entry]:
    """Raises TypeError, ValueError or AttributeError for anything but entries of this kind."""
    found = {name: kind(**entry) for name, entry in content.items()}
    for name, entry in found.items():
        values = vars(entry)
        if not (isinstance(values["sha256"], str) and isinstance(values.get("bytes", 0), int)):
            raise ValueError(f"{name!r} has no digest")
    return found
