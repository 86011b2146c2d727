"""Pickles in checkpoints, opened for tensors and plain values only.

A pickle is a program: it calls what it can name, and changes what it has named. Here every name leads to a stand-in
that can do nothing, and what comes out is looked at field by field before torch's own records are made of it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from paralign.models.errors import CheckpointError

METADATA = ".metadata"
# megatron-core's file of what is the same on every rank; since 0.19 it is an object beside the tensors.
COMMON, COMMON_OBJECT = "common.pt", "common_state/shard_0_1"
BACKEND = "metadata.json"  # megatron-core's file of the format
_FORCE, _FORCE_NO = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

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


class MetadataReader(FileSystemReader):
    """torch's reader of a checkpoint's files, whose `.metadata` is read here, once."""

    _found: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises CheckpointError as the function of this name."""
        del args, kwargs
        if self._found is None:
            self._found = read_metadata(Path(self.path))
            self._found.storage_meta = StorageMeta(load_id=self.load_id)
        return self._found


def read_metadata(directory: Path) -> Metadata:
    """What `.metadata` says of the tensors of a checkpoint, and nothing else that it may hold.

    Raises:
        CheckpointError: it is missing or damaged, holds more than that, or names a file in another directory.
    """
    path = directory / METADATA
    try:
        with path.open("rb") as file:
            found = _MetadataUnpickler(file).load()
        return _metadata(found)
    except Exception as error:  # a pickle can raise anything
        raise unreadable(f"{path}: cannot be read", error) from None


def refuse_more_than_tensors(reader: MetadataReader) -> None:
    """Opens what else megatron-core is about to open of a training state, for an error that says what is wrong.

    Raises:
        CheckpointError: a file is missing or damaged, or holds more than tensors and plain values.
    """
    found, directory = reader.read_metadata(), Path(reader.path)
    path = directory / BACKEND
    try:
        if json.loads(path.read_text())["sharded_backend"] != "torch_dist":
            raise ValueError("of another format than torch_dist")
        path = directory / COMMON
        in_file = path.exists() or COMMON_OBJECT not in found.state_dict_metadata
        if in_file:
            _refuse_without_optimizer(_load_weights_only(path.read_bytes()))
        for name, stored in found.state_dict_metadata.items():
            if isinstance(stored, BytesStorageMetadata):
                item = found.storage_data[MetadataIndex(name)]
                path = directory / item.relative_path
                with path.open("rb") as file:
                    file.seek(item.offset)
                    content = _load_weights_only(file.read(item.length))
                if name == COMMON_OBJECT and not in_file:
                    _refuse_without_optimizer(*content)
    except Exception as error:
        raise unreadable(f"{path}: cannot be read", error) from None


@contextmanager
def weights_only() -> Iterator[None]:
    """torch.load unpickles tensors and plain values only, whatever its caller asks for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NO)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def unreadable(what: str, error: Exception) -> CheckpointError:
    """The error of a file that was not read to its end; `what` names it and says what it should have been."""
    if isinstance(error, MoreThanTensors):
        remedy = "nothing of it was run; take the checkpoint from somebody you trust"
    else:
        remedy = "copy the checkpoint again"
    said = str(error).splitlines() or [type(error).__name__]
    return CheckpointError(f"{what} ({said[0]}); {remedy}")


def _refuse_without_optimizer(common: Any) -> None:
    if "optimizer" not in common:
        raise ValueError("it has no optimizer")


def _load_weights_only(content: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise MoreThanTensors(named[1]) from None
        raise ValueError("not as torch.save writes it") from None


class _Inert(type):
    """A class that a pickle cannot change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it changes {cls.__name__}")


class _Record(metaclass=_Inert):
    """Stands for an instance; keeps what it was given."""

    fields: Any = None

    def __setstate__(self, state: Any) -> None:
        self.fields = state


_Whole, _Index, _Place, _Objects, _Tensors, _Properties, _Chunk = (
    _Inert(f"_{name}", (_Record,), {})
    for name in ("Whole", "Index", "Place", "Objects", "Tensors", "Properties", "Chunk")
)


def inert(function: Callable[..., Any]) -> Any:
    """What calls a function, and cannot be changed by a pickle, which could give a function other defaults."""
    return type("Inert", (), {"__slots__": (), "__call__": lambda self, *values: function(*values)})()


_nothing = inert(lambda *_: None)


_OF_METADATA, _OF_PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"


class _MetadataUnpickler(Restricted):
    known: ClassVar[Names] = {
        (_OF_METADATA, "Metadata"): _Whole,
        (_OF_METADATA, "MetadataIndex"): _Index,
        (_OF_METADATA, "BytesStorageMetadata"): _Objects,
        (_OF_METADATA, "TensorStorageMetadata"): _Tensors,
        (_OF_METADATA, "TensorProperties"): _Properties,
        (_OF_METADATA, "ChunkStorageMetadata"): _Chunk,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Place,
        ("torch", "Size"): tuple,
        **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
        # Of no use here: how the save was planned.
        (_OF_METADATA, "StorageMeta"): _Record,
        **{
            (_OF_PLANNER, name): _Record
            for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem")
        },
        (_OF_METADATA, "_MEM_FORMAT_ENCODING"): _nothing,
        (_OF_PLANNER, "WriteItemType"): _nothing,
        ("torch.serialization", "_get_layout"): _nothing,
        **{(module, "PosixPath"): _nothing for module in ("pathlib", "pathlib._local")},
    }


def _metadata(found: Any) -> Metadata:
    """torch's records of stand-ins; raises an error of any kind for what is not one of them."""
    whole = _fields(found, _Whole)
    stored, places = _checked(whole["state_dict_metadata"], dict), _checked(whole["storage_data"], dict)
    tensors = {_checked(name, str): _stored(name, record) for name, record in stored.items()}
    storage = dict(map(_placed, places.items()))
    for name, record in tensors.items():
        of_tensor = [chunk.offsets for chunk in getattr(record, "chunks", ())]
        for index in [MetadataIndex(name, offsets) for offsets in of_tensor] or [MetadataIndex(name)]:
            if index not in storage:
                raise pickle.UnpicklingError(f"it does not say where {name} is")
    return Metadata(
        state_dict_metadata=tensors,
        storage_data=storage,
        version=None if whole.get("version") is None else _checked(whole["version"], str),
    )


def _stored(name: str, stored: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(stored) is _Objects:
        return BytesStorageMetadata()
    fields = _fields(stored, _Tensors)
    dtype, *_ = _checked(_checked(fields["properties"], _Properties).fields, tuple)
    chunks = [_fields(chunk, _Chunk) for chunk in _checked(fields["chunks"], list)]
    whole = _size(fields["size"])
    parts = [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks]
    for part in parts:
        bounds = list(zip(part.offsets, part.sizes, whole))
        inside = len(part.offsets) == len(part.sizes) == len(whole)
        if not inside or any(start < 0 or size < 0 or start + size > end for start, size, end in bounds):
            raise pickle.UnpicklingError(
                f"it has a piece of {name} that lies outside its shape {tuple(whole)}"
            )
    distinct = {part.offsets for part in parts if part.sizes.numel()}
    n_elements = [part.sizes.numel() for part in parts]
    if sum(n_elements) != whole.numel() or len(distinct) != sum(n > 0 for n in n_elements) or not parts:
        raise pickle.UnpicklingError(f"its pieces of {name} do not make up its shape {tuple(whole)}")
    return TensorStorageMetadata(TensorProperties(dtype=_checked(dtype, torch.dtype)), whole, parts)


def _placed(item: tuple[Any, Any]) -> tuple[MetadataIndex, _StorageInfo]:
    index, place = _fields(item[0], _Index), _fields(item[1], _Place)
    offset = index.get("offset")
    file = _checked(place["relative_path"], str)
    if Path(file).name != file or file in ("", ".", ".."):
        raise pickle.UnpicklingError(f"it leads to {file}, outside the directory")
    if place.get("transform_descriptors"):
        raise pickle.UnpicklingError(f"it keeps {file} in another form than torch.save's")
    return (
        MetadataIndex(_checked(index["fqn"], str), None if offset is None else _size(offset)),
        _StorageInfo(file, _checked(place["offset"], int), _checked(place["length"], int)),
    )


def _checked(value: Any, kind: type) -> Any:
    """The value, which is of this very type."""
    if type(value) is not kind:
        raise pickle.UnpicklingError(f"it holds {type(value).__name__} where {kind.__name__} is expected")
    return value


def _fields(record: Any, kind: type) -> dict[str, Any]:
    return _checked(_checked(record, kind).fields, dict)


def _size(value: Any) -> torch.Size:
    return torch.Size([_checked(entry, int) for entry in _checked(value, tuple)])
