"""Pickles in checkpoints, opened for tensors and plain values only. Owns what is allowed, not the format.

A pickle is a program: it calls whatever it can name. Here it can name the records in which torch keeps what tensors
there are and where they lie. Any other name ends the reading before anything has been called.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from paralign.models.errors import CheckpointError

METADATA = ".metadata"
COMMON = "common.pt"  # megatron-core's file of what is the same on every rank
# What unpickling a damaged file, or a file of something else, can raise.
BROKEN = (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, LookupError)

Names = Mapping[tuple[str, str], Any]


class MoreThanTensors(pickle.UnpicklingError):
    """A pickle names something that it could call."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it holds more than tensors: {name}, which could run code")


class Restricted(pickle.Unpickler):
    """Finds the names in `known` only; raises MoreThanTensors at any other."""

    known: ClassVar[Names] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise MoreThanTensors(f"{module}.{name}")
        return self.known[module, name]


def read_metadata(directory: Path) -> Metadata:
    """What `.metadata` says of the tensors of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged, holds more than that, or names a file in another directory.
    """
    path = directory / METADATA
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            found = _MetadataUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it holds {type(found).__name__}")
        for item in found.storage_data.values():
            if Path(item.relative_path).name != item.relative_path:
                raise pickle.UnpicklingError(f"it leads to {item.relative_path}, outside the directory")
    except BROKEN as error:
        raise unreadable(f"{path}: cannot be read", error) from None
    return found


def refuse_more_than_tensors(directory: Path) -> None:
    """Opens every pickle of a training state that megatron-core and torch are about to open without restriction.

    Raises:
        CheckpointError: one is missing or damaged, or holds more than tensors and plain values.
    """
    found = read_metadata(directory)
    path = directory / COMMON
    try:
        _load_weights_only(path.read_bytes())
        for name, stored in found.state_dict_metadata.items():
            if isinstance(stored, BytesStorageMetadata):
                item = found.storage_data[MetadataIndex(name)]
                path = directory / item.relative_path
                with path.open("rb") as file:
                    file.seek(item.offset)
                    _load_weights_only(file.read(item.length))
    except BROKEN as error:
        raise unreadable(f"{path}: cannot be read", error) from None


def unreadable(what: str, error: Exception) -> CheckpointError:
    """The error of a pickle that was not read to its end; `what` names it and says what it should have been."""
    if isinstance(error, MoreThanTensors):
        remedy = "nothing of it was run; take the checkpoint from somebody you trust"
    else:
        remedy = "copy the checkpoint again"
    return CheckpointError(f"{what} ({error}); {remedy}")


def _load_weights_only(content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise MoreThanTensors(named[1] if named else str(error).splitlines()[0]) from None
    except RuntimeError as error:  # of an archive that is cut off
        raise pickle.UnpicklingError(str(error).splitlines()[0]) from None


def _named(module: Any, *names: str) -> Names:
    return {(module.__name__, name): getattr(module, name) for name in names}


class _MetadataUnpickler(Restricted):
    known: ClassVar[Names] = {
        **_named(
            metadata,
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        ),
        **_named(planner, "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
        **_named(filesystem, "_StorageInfo"),
        **_named(pathlib, "PosixPath"),
        **_named(
            torch, "Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
        ),
        **_named(torch.serialization, "_get_layout"),
        ("collections", "OrderedDict"): OrderedDict,
    }
