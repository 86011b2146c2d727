"""Files of torch's distributed checkpoints: tensors read one at a time, and written one after another.

Training saves and loads through megatron-core (training/state.py), which reads through `StateReader`; the rest reads
and writes the same files where there is no process group.

Each tensor is an archive of its own as `torch.save` makes it: a zip, not compressed, of a pickle that says
dtype and shape, and of the bytes. `torch.load` and `torch.save` copy them several times, so it is read and
written here: bytes are mapped where they lie, and written block by block.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from paralign.models.errors import CheckpointError
from paralign.models.weights import Shape, Views, in_blocks

from ..files.stretch import read_stretch
from ..files.whole_file import write_whole
from .rawfile import MappedBytes, MappedFiles, WriteBehind, lightly, raw
from .tensor_digest import refuse_other
from .unpickle import METADATA, MetadataReader, Names, Restricted, inert, read_metadata, unreadable

AT_ONCE = 2**24  # bytes of a tensor in the host's memory while it is loaded
ALIGNMENT = 64  # of a tensor's bytes within its archive, as torch has it


class Stretch(NamedTuple):
    """Where a tensor lies: file name, first byte, number of bytes."""

    file: str
    offset: int
    length: int


class CheckpointFiles:
    """The tensors of a checkpoint by name, whole, on the CPU.

    Attributes:
        stored: shape, dtype and pieces of every tensor.

    Raises:
        CheckpointError: no metadata, or a file that is missing or cut off.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        metadata = read_metadata(directory)
        self._storage: Mapping[MetadataIndex, Any] = metadata.storage_data
        ends: dict[str, int] = {}
        for item in self._storage.values():
            ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
        for file, end in ends.items():
            path = directory / file
            size = path.stat().st_size if path.exists() else 0
            if size < end:
                raise CheckpointError(
                    f"{path}: {size} bytes, .metadata says {end}; copy the checkpoint again"
                )
        self.files = [directory / file for file in sorted(ends)]
        self._mapped = {file: MappedBytes(directory / file) for file in ends}
        self._files = MappedFiles(self._mapped.values())
        self.own, self.release = self._files.own, self._files.release
        self.stored: dict[str, TensorStorageMetadata] = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """The whole tensor: the file itself where a rank has saved it whole, else put together from the pieces.

        Raises:
            CheckpointError: what is stored is not a tensor as `torch.save` writes it.
            WeightsError: a file has changed since the checkpoint was opened.
        """
        stored = self.stored[name]
        whole = None
        for chunk in stored.chunks:
            item = self._storage[MetadataIndex(name, chunk.offsets)]
            piece = self._piece(name, item)
            refuse_other_piece(self._directory / item.relative_path, name, piece, chunk.sizes, stored)
            if tuple(piece.shape) == tuple(stored.size):
                return piece
            if whole is None:
                whole = torch.empty(stored.size, dtype=stored.properties.dtype)
            target = whole
            for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
                target = target.narrow(dim, start, size)
            target.copy_(self.own(piece))
        assert whole is not None
        self.release()
        return whole

    def files_of(self, name: str) -> list[Path]:
        """The files with the pieces of a tensor."""
        chunks = self.stored[name].chunks
        items = [self._storage[MetadataIndex(name, chunk.offsets)] for chunk in chunks]
        return [self._directory / item.relative_path for item in items]

    def check(self, name: str) -> None:
        """Reads a tensor, and compares the CRC32 of its bytes with the one that was saved with them.

        Raises:
            WeightsError: it is another one.
            CheckpointError: as `read`.
        """
        for chunk in self.stored[name].chunks:
            item = self._storage[MetadataIndex(name, chunk.offsets)]
            mapped = self._mapped[item.relative_path]
            record = self._record(name, item)
            if not record.length:
                continue
            flat = mapped.tensor(record.start, torch.uint8, record.length)
            found = 0
            for (block,) in lightly(in_blocks([flat]), mapped):
                found = zlib.crc32(raw(block), found)
            other = "" if found == record.crc32 else "other bytes than its CRC32 says"
            refuse_other(self._directory / item.relative_path, name, other)

    def _piece(self, name: str, item: Any) -> Tensor:
        record = self._record(name, item)
        plan = record.plan
        n_elements = record.length // plan.dtype.itemsize
        if not n_elements:
            return torch.empty(plan.shape, dtype=plan.dtype)
        flat = self._mapped[item.relative_path].tensor(record.start, plan.dtype, n_elements)
        return flat.as_strided(plan.shape, plan.stride, plan.first)

    def _record(self, name: str, item: Any) -> _Record:
        self._files.check()
        return record_at(self._directory / item.relative_path, name, item)


class _Record(NamedTuple):
    """A tensor's bytes in a file: what they are, the first one, how many, and what their CRC32 was."""

    plan: _TensorPlan
    start: int
    length: int
    crc32: int


def refuse_other_piece(path: Path, name: str, found: Any, sizes: torch.Size, stored: Any) -> None:
    """Raises CheckpointError where a piece, as a tensor or a plan, is not the one that `.metadata` tells of."""
    piece, said = (tuple(found.shape), found.dtype), (tuple(sizes), stored.properties.dtype)
    if piece != said:
        raise CheckpointError(
            f"{path}: {name}: a piece of {piece[0]}, {piece[1]}, where {METADATA} says {said[0]}, {said[1]}; copy "
            "the checkpoint again"
        )


def record_at(path: Path, name: str, item: Any) -> _Record:
    """Where the bytes of a stored piece lie; raises CheckpointError where it is not as torch.save writes it."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_View(file, item.offset, item.length)) as archive:
            pickled = next(entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
            plan = _TensorPlan.load(archive.read(pickled))
            info = archive.getinfo(pickled.replace("data.pkl", f"data/{plan.storage}"))
            if info.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError("it is compressed")
            header = item.offset + info.header_offset
            file.seek(header + 26)
            lengths = file.read(4)  # of the name, two bytes, and of the extra: the archive's end has others
        skipped = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        start = header + 30 + skipped
        too_long = start + info.file_size > item.offset + item.length
        if too_long or plan.end * plan.dtype.itemsize > info.file_size:
            raise pickle.UnpicklingError("it is cut off")
        return _Record(plan, start, info.file_size, info.CRC)
    except Exception as error:  # of a file that is not one, anything
        raise unreadable(f"{path}: {name}: not a tensor as torch.save writes it", error) from None


class StateReader(MetadataReader):
    """Reads what a rank loads of a training state: of each stored piece no rows but those that are asked for.

    torch's own reader unpickles whole pieces. Here no tensor is unpickled, and the host holds 16 MiB of one.

    Attributes:
        n_bytes: of tensors, read so far.
    """

    n_bytes = 0

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See torch; raises CheckpointError where a file is damaged."""
        for wanted in plan.items:
            index = wanted.storage_index
            item = self.storage_data[index]
            path = Path(self.path) / item.relative_path
            if wanted.type is LoadItemType.BYTE_IO:
                with path.open("rb") as file:
                    file.seek(item.offset)
                    planner.load_bytes(wanted, io.BytesIO(file.read(item.length)))
                continue
            target = planner.resolve_tensor(wanted).detach()
            record = record_at(path, index.fqn, item)
            stored = self.read_metadata().state_dict_metadata[index.fqn]
            sizes = next(chunk.sizes for chunk in stored.chunks if chunk.offsets == index.offset)
            refuse_other_piece(path, index.fqn, record.plan, sizes, stored)
            self._fill(target, path, record, wanted.storage_offsets)
            planner.commit_tensor(wanted, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, target: Tensor, path: Path, record: _Record, offsets: Sequence[int]) -> None:
        """Fills `target` with the box of a stored tensor that begins at `offsets`, some rows at a time."""
        if not target.numel():
            return
        itemsize, strides = record.plan.dtype.itemsize, record.plan.stride or (1,)
        first = record.plan.first + sum(offset * stride for offset, stride in zip(offsets, strides))
        rows = target if target.dim() else target.view(1)
        width = 1 + sum((size - 1) * stride for size, stride in zip(rows.shape[1:], strides[1:]))
        with path.open("rb", buffering=0) as file:
            for block in rows.split(max(1, AT_ONCE // (max(strides[0], 1) * itemsize))):
                n_elements = (len(block) - 1) * strides[0] + width
                held = torch.empty(n_elements, dtype=record.plan.dtype, pin_memory=block.is_cuda)
                n_read = read_stretch(file.fileno(), raw(held), record.start + first * itemsize)
                if n_read < held.nbytes:
                    raise CheckpointError(f"{path}: was cut off while it was read; copy the checkpoint again")
                block.copy_(held.as_strided(block.shape, strides))
                first += len(block) * strides[0]
                self.n_bytes += n_read


class CheckpointFileWriter:
    """Writes whole tensors into one file; `stretches` says where each has come to lie."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = WriteBehind(path)
        self.close = self._file.close
        self.stretches: dict[str, Stretch] = {}

    def write(self, name: str, shape: Shape, dtype: torch.dtype, parts: Views) -> None:
        """Writes a tensor of `shape` and `dtype`; raises ValueError if the parts are another one."""
        section = _Section(self._file)
        with zipfile.ZipFile(section, "w") as archive:  # type: ignore[call-overload]
            for entry, content in (
                ("data.pkl", _TensorPlan("0", dtype, shape).dump()),
                ("byteorder", b"little"),
                ("version", b"3\n"),
            ):  # as ZipInfo, which has no time of writing: the same tensors are the same bytes
                archive.writestr(zipfile.ZipInfo(f"archive/{entry}"), content)
            info = zipfile.ZipInfo("archive/data/0")
            info.file_size = math.prod(shape) * dtype.itemsize
            large = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own threshold
            header = 30 + len(info.filename) + 4 + 20 * large
            padding = -(section.tell() + header) % ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w") as file:
                for part in parts:
                    if part.dtype != dtype:
                        raise ValueError(f"{name} is {part.dtype}, the file {dtype}")
                    file.write(raw(part))
            if info.file_size != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not have {shape} elements")
        self.stretches[name] = Stretch(self._name, section.start, section.tell())


def write_metadata(
    directory: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, stretches: Mapping[str, Stretch]
) -> None:
    """Makes a checkpoint of files of whole tensors; the last thing to be written."""
    offsets = {name: torch.Size([0] * len(shape)) for name, shape in shapes.items()}
    metadata = Metadata(
        state_dict_metadata={
            name: TensorStorageMetadata(
                TensorProperties(dtype=dtype),
                torch.Size(shape),
                [ChunkStorageMetadata(offsets[name], torch.Size(shape))],
            )
            for name, shape in shapes.items()
        },
        storage_data={MetadataIndex(name, offsets[name]): _StorageInfo(*stretches[name]) for name in shapes},
        version="1.0.0",
    )
    write_whole(directory / METADATA, pickle.dumps(metadata))


class _TensorPlan(NamedTuple):
    """What an archive's pickle says: the entry with the bytes, dtype, shape, and where the elements are in it."""

    storage: str
    dtype: torch.dtype
    shape: Shape
    stride: Shape = ()
    first: int = 0

    def dump(self) -> bytes:
        """The pickle of a contiguous tensor, in the words of `torch.save`."""
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=2).dump(_Rebuilt(self))
        return buffer.getvalue()

    @property
    def end(self) -> int:
        """Of the elements that the bytes must hold, how many."""
        if 0 in self.shape:
            return 0
        return 1 + self.first + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))

    @classmethod
    def load(cls, pickled: bytes) -> _TensorPlan:
        """Runs nothing that the pickle names; raises UnpicklingError for any but a dense tensor."""
        plan = _Unpickler(io.BytesIO(pickled)).load()
        if not isinstance(plan, cls):
            raise pickle.UnpicklingError(f"it holds {type(plan).__name__}")
        return plan


class _Rebuilt:
    """Pickles as the call that makes a tensor of its storage."""

    def __init__(self, plan: _TensorPlan) -> None:
        self.plan = plan

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.plan.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (
            _Storage(self.plan),
            0,
            self.plan.shape,
            stride,
            False,
            OrderedDict(),
        )


class _Storage:
    """Pickles as a storage that lies in an entry of its own."""

    def __init__(self, plan: _TensorPlan) -> None:
        kind = next(kind for kind, dtype in STORAGES.items() if dtype == plan.dtype)
        self.persistent_id = ("storage", getattr(torch, kind), plan.storage, "cpu", math.prod(plan.shape))


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id if isinstance(obj, _Storage) else None


def _plan(storage: tuple[str, torch.dtype], first: int, shape: Shape, stride: Shape, *_: Any) -> _TensorPlan:
    plan = _TensorPlan(*storage, tuple(shape), tuple(stride), first)
    numbers = (first, *plan.shape, *plan.stride)
    natural = all(type(number) is int and number >= 0 for number in numbers)
    if not natural or len(plan.shape) != len(plan.stride) or plan.dtype not in STORAGES.values():
        raise pickle.UnpicklingError("it holds what no tensor has")
    return plan


STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}


class _Unpickler(Restricted):
    known: ClassVar[Names] = {
        ("torch._utils", "_rebuild_tensor_v2"): inert(_plan),
        ("torch._utils", "_rebuild_parameter"): inert(lambda data, *_: data),
        ("collections", "OrderedDict"): OrderedDict,
        **{("torch", kind): dtype for kind, dtype in STORAGES.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage") and name not in STORAGES:
            raise pickle.UnpicklingError(f"it is of {name}; expected {', '.join(STORAGES)}")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        return pid[2], pid[1]


class _Section:
    """A file from where it stands, as a file of its own."""

    def __init__(self, file: WriteBehind) -> None:
        self._file, self.start = file, file.tell()
        self.write, self.flush = file.write, file.flush

    def tell(self) -> int:
        return self._file.tell() - self.start

    def seek(self, offset: int) -> int:
        return self._file.seek(self.start + offset) - self.start


class _View(io.RawIOBase):
    """`length` bytes of an open file from `start`, as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._start + self._at)
        wanted = max(0, min(len(buffer), self._length - self._at))
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._at += count
        return count
