"""Archives of torch's checkpoints: read where they lie, written so that torch and unzip find them sound."""

import io
import pickle
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from paralign.engine.checkpoint import dcpfile
from paralign.engine.checkpoint.dcpfile import (
    CheckpointFiles,
    CheckpointFileWriter,
    StateReader,
    write_metadata,
)
from paralign.models.errors import CheckpointError, WeightsError
from paralign.models.weights import bit_equal


def write(directory, tensors):
    writer = CheckpointFileWriter(directory / "__0_0.distcp")
    for name, tensor in tensors.items():
        writer.write(name, tuple(tensor.shape), tensor.dtype, tensor.split(3))
    writer.close()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_metadata(directory, shapes, next(iter(tensors.values())).dtype, writer.stretches)
    return writer.stretches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_archive_is_torchs_and_a_sound_zip(tmp_path, dtype):
    tensors = {"a": torch.randn(7, 5).to(dtype), "b": torch.randn(11).to(dtype)}
    content = {}
    for name, (file, offset, length) in write(tmp_path, tensors).items():
        content[name] = (tmp_path / file).read_bytes()[offset : offset + length]
        loaded = torch.load(io.BytesIO(content[name]), weights_only=True)
        assert bit_equal(loaded, tensors[name])
        assert loaded.is_contiguous()
        assert zipfile.ZipFile(io.BytesIO(content[name])).testzip() is None
        assert bit_equal(CheckpointFiles(tmp_path).read(name), tensors[name])
        start = content[name].index(bytes(tensors[name].view(torch.uint8).flatten().tolist()))
        assert start % 64 == 0


def test_what_torch_has_saved_is_read_without_a_copy(tmp_path):
    tensors = {
        "whole": torch.randn(6, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "turned": torch.randn(5, 3).t(),
    }
    dcp.save(dict(tensors), checkpoint_id=tmp_path, no_dist=True)
    files = CheckpointFiles(tmp_path)
    for name, tensor in tensors.items():
        assert bit_equal(files.read(name), tensor.detach()), name
    files.read("whole").zero_()
    assert bit_equal(CheckpointFiles(tmp_path).read("whole"), tensors["whole"])


def test_the_sum_that_torch_saves_with_a_tensor_tells_of_each_flipped_bit(tmp_path):
    tensors = {"a": torch.randn(60, 4), "b": torch.randn(30).bfloat16(), "none": torch.zeros(0, 3)}
    dcp.save(dict(tensors), checkpoint_id=tmp_path, no_dist=True)
    for name in tensors:
        CheckpointFiles(tmp_path).check(name)
    path = tmp_path / "__0_0.distcp"
    content = path.read_bytes()
    for name in ("a", "b"):
        start = content.index(bytes(tensors[name].view(torch.uint8).flatten().tolist()))
        for at in (start, start + tensors[name].nbytes - 1):
            broken = bytearray(content)
            broken[at] ^= 8
            path.write_bytes(broken)
            CheckpointFiles(tmp_path).read(name)
            with pytest.raises(WeightsError, match=rf"distcp: {name}: other bytes than its CRC32 says"):
                CheckpointFiles(tmp_path).check(name)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_shares_of_several_ranks_are_put_together(tmp_path, dim):
    whole = torch.randn(6, 8)
    storage, chunks = {}, []
    for rank, share in enumerate(whole.tensor_split(4, dim)):
        writer = CheckpointFileWriter(tmp_path / f"__{rank}_0.distcp")
        writer.write("a", tuple(share.shape), share.dtype, share)
        writer.close()
        offsets = torch.Size(
            [0, 0] if rank == 0 else [sum(c.sizes[d] for c in chunks) * (d == dim) for d in (0, 1)]
        )
        chunks.append(ChunkStorageMetadata(offsets, share.shape))
        storage[MetadataIndex("a", offsets)] = _StorageInfo(*writer.stretches["a"])
    stored = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.shape, chunks)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": stored}, storage_data=storage)))
    assert bit_equal(CheckpointFiles(tmp_path).read("a"), whole)
    loaded = {"a": torch.empty(6, 8)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert bit_equal(loaded["a"], whole)


CHUNK = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.chunks.clear(), "pieces of a do not make up its shape"),
        (lambda stored: stored.chunks.__setitem__(0, CHUNK), "pieces of a do not make up its shape"),
        (lambda stored: stored.chunks.append(stored.chunks[0]), "pieces of a do not make up its shape"),
        (
            lambda stored: setattr(stored.chunks[0], "offsets", torch.Size([-2, 0])),
            "piece of a that lies outside",
        ),
        (
            lambda stored: setattr(stored.chunks[0], "offsets", torch.Size([1, 0])),
            "piece of a that lies outside",
        ),
        (lambda stored: setattr(stored.chunks[0], "sizes", torch.Size([12])), "piece of a that lies outside"),
    ],
)
def test_pieces_that_are_not_the_whole_are_refused(tmp_path, change, message):
    write(tmp_path, {"a": torch.randn(4, 3)})
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    change(metadata.state_dict_metadata["a"])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=message):
        CheckpointFiles(tmp_path)


def test_a_piece_that_is_another_one_is_refused(tmp_path):
    write(tmp_path, {"a": torch.randn(4, 3)})
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["a"].properties.dtype = torch.bfloat16
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"a: a piece of \(4, 3\), torch.float32, where .metadata says"):
        CheckpointFiles(tmp_path).read("a")


def test_a_tensor_without_elements_is_read(tmp_path):
    dcp.save({"a": torch.zeros(0, 3), "b": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)
    assert CheckpointFiles(tmp_path).read("a").shape == (0, 3)


def test_a_function_that_a_pickle_names_cannot_be_changed(tmp_path):
    write(tmp_path, {"a": torch.zeros(3)})
    for name in ("torch.serialization\n_get_layout", "pathlib\nPosixPath"):
        (tmp_path / ".metadata").write_bytes(f"c{name}\n(N}}S'__defaults__'\n(I1\ntstb.".encode())
        with pytest.raises(CheckpointError, match="cannot be read"):
            CheckpointFiles(tmp_path)


class Harm:
    def __reduce__(self):
        return print, ("harm",)


@pytest.mark.parametrize(
    "content", [Harm(), [1], torch.zeros(2, dtype=torch.int8), torch.zeros(2).to_sparse()]
)
def test_a_pickle_of_anything_else_is_refused_and_not_run(tmp_path, content, capsys):
    (file, *_) = write(tmp_path, {"a": torch.zeros(2000)})["a"]
    buffer = io.BytesIO()
    torch.save(content, buffer)
    whole = (tmp_path / file).read_bytes()
    with (
        zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as saved,
        zipfile.ZipFile(tmp_path / file, "w") as archive,
    ):
        for name in saved.namelist():
            archive.writestr(name, saved.read(name))
        archive.comment = b" " * (len(whole) - 4000)
    size = (tmp_path / file).stat().st_size
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    for item in metadata.storage_data.values():
        item.length = size
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"distcp: a: not a tensor as torch.save writes it \(it "):
        CheckpointFiles(tmp_path).read("a")
    assert "harm" not in capsys.readouterr().out


def test_bytes_that_are_no_archive_are_refused(tmp_path):
    (file, offset, length) = write(tmp_path, {"a": torch.zeros(9)})["a"]
    (tmp_path / file).write_bytes(bytes(offset + length))
    with pytest.raises(CheckpointError, match=r"a: not a tensor as torch\.save writes it"):
        CheckpointFiles(tmp_path).read("a")


def test_parts_that_are_not_the_tensor_are_a_fault(tmp_path):
    writer = CheckpointFileWriter(tmp_path / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"a does not have \(3,\) elements"):
        writer.write("a", (3,), torch.float32, [torch.zeros(2)])
    with pytest.raises(ValueError, match=r"b is torch.float16, the file torch.float32"):
        writer.write("b", (2,), torch.float32, [torch.zeros(2).half()])


def load(directory, targets):
    """What a rank loads of a training state; how many bytes of tensors it read."""
    reader = StateReader(directory)
    try:
        dcp.load(targets, storage_reader=reader, no_dist=True)
    except dcp.api.CheckpointException as error:
        raise error.failures[0][0] from None
    return reader.n_bytes


@pytest.mark.parametrize("at_once", [1, 40, 2**24])
def test_a_training_state_is_read_as_torch_reads_it(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(dcpfile, "AT_ONCE", at_once)
    saved = {
        "matrix": torch.randn(6, 4),
        "vector": torch.randn(70).bfloat16(),
        "cube": torch.randn(4, 3, 2),
        "scalar": torch.tensor(3.0),
    }
    n_bytes = sum(tensor.nbytes for tensor in saved.values())
    dcp.save({**saved, "turned": torch.arange(15.0).view(5, 3).t()}, checkpoint_id=tmp_path, no_dist=True)
    found = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    assert load(tmp_path, found) == n_bytes
    turned = torch.zeros(3, 5)
    load(tmp_path, {"turned": turned})
    assert torch.equal(turned, torch.arange(15.0).view(5, 3).t())
    assert all(bit_equal(found[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("box", "n_read"),
    [
        ((slice(2, 5), slice(None)), 3 * 8),
        ((slice(3, 4), slice(2, 7)), 5),
        ((slice(1, 3), slice(6, 8)), 8 + 2),  # from the first of them to the last
    ],
)
def test_no_more_than_the_rows_that_are_asked_for_is_read(tmp_path, box, n_read):
    saved = torch.arange(48, dtype=torch.float32).view(6, 8)
    write(tmp_path, {"a": saved})
    wanted = saved[box]
    reader = StateReader(tmp_path)
    target = torch.zeros(wanted.shape)
    (index,) = reader.read_metadata().storage_data
    item = dcp.planner.ReadItem(
        type=dcpfile.LoadItemType.TENSOR,
        dest_index=index,
        dest_offsets=torch.Size([0, 0]),
        storage_index=index,
        storage_offsets=torch.Size([part.start or 0 for part in box]),
        lengths=wanted.shape,
    )
    planner = dcp.DefaultLoadPlanner()
    planner.resolve_tensor, planner.commit_tensor = lambda _: target, lambda *_: None
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    reader.read_data(dcp.LoadPlan([item]), planner).wait()
    assert torch.equal(target, wanted)
    assert reader.n_bytes == 4 * n_read


def test_a_damaged_training_state_is_called_that(tmp_path):
    stretches = write(tmp_path, {"a": torch.randn(6, 8), "b": torch.randn(3)})
    path = tmp_path / "__0_0.distcp"
    whole = path.read_bytes()
    targets = {"a": torch.zeros(6, 8)}
    for damaged in (whole[: stretches["a"].length // 2], b"", bytes(len(whole))):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"__0_0.distcp: a: not a tensor as torch.save writes it"):
            load(tmp_path, targets)
    path.write_bytes(whole)
    write_metadata(tmp_path, {"a": (6, 8)}, torch.bfloat16, {"a": stretches["a"]})
    with pytest.raises(CheckpointError, match=r"a: a piece of \(6, 8\), torch.float32, where .metadata says"):
        load(tmp_path, targets)


class _Tensor:
    """Pickles as a tensor of these bytes: kind of its storage, first element, shape, stride."""

    def __init__(self, kind, *numbers):
        self.storage, self.numbers = SimpleNamespace(kind=kind), numbers

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.numbers, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return ("storage", obj.kind, "0", "cpu", 48) if isinstance(obj, SimpleNamespace) else None


def write_tensor(directory, *tensor, n_bytes):
    """A tensor of (6, 8) in float32, as `.metadata` has it, whose own pickle says what is given here."""
    pickled, content = io.BytesIO(), io.BytesIO()
    _Pickler(pickled, protocol=2).dump(_Tensor(*tensor))
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/data/0", torch.arange(n_bytes // 4).float().numpy().tobytes())
    (directory / "__0_0.distcp").write_bytes(content.getvalue())
    stretch = dcpfile.Stretch("__0_0.distcp", 0, content.tell())
    write_metadata(directory, {"a": (6, 8)}, torch.float32, {"a": stretch})


@pytest.mark.parametrize(
    "tensor",
    [
        *((torch.FloatStorage, first, (6, 8), (8, 1)) for first in (-3, -(10**6), 1, 0.5, "x", 10**30)),
        *(
            (torch.FloatStorage, 0, (6, 8), stride)
            for stride in ((-8, 1), (8.0, 1.0), ("a", "b"), (True, 1), (8, 10**10), (8,), (), (8, 1, 1))
        ),
        (torch.FloatStorage, 0, (6.0, 8.0), (8, 1)),
        ("float", 0, (6, 8), (8, 1)),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path, tensor):
    write_tensor(tmp_path, *tensor, n_bytes=192)
    refused = pytest.raises(
        CheckpointError, match=r"a: not a tensor as torch\.save writes it .*copy the check"
    )
    with refused:
        load(tmp_path, {"a": torch.zeros(6, 8)})
    with refused:
        CheckpointFiles(tmp_path).read("a")


def test_a_tensor_whose_rows_are_one_is_read(tmp_path):
    write_tensor(tmp_path, torch.FloatStorage, 0, (6, 8), (0, 1), n_bytes=32)
    found = {"a": torch.zeros(6, 8)}
    load(tmp_path, found)
    assert torch.equal(found["a"], torch.arange(8.0).expand(6, 8))
    assert torch.equal(CheckpointFiles(tmp_path).read("a"), found["a"])


def test_a_tensor_in_a_training_state_runs_nothing(tmp_path, capsys):
    stretches = write(tmp_path, {"a": torch.randn(6, 8)})
    content = io.BytesIO()
    torch.save(Harm(), content)
    (tmp_path / "__0_0.distcp").write_bytes(content.getvalue())
    stretches["a"] = stretches["a"]._replace(length=content.tell())
    write_metadata(tmp_path, {"a": (6, 8)}, torch.float32, stretches)
    with pytest.raises(CheckpointError, match=r"it holds more than tensors: .*nothing of it was run"):
        load(tmp_path, {"a": torch.zeros(6, 8)})
    assert "harm" not in capsys.readouterr().out
