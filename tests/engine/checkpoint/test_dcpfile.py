"""Archives of torch's checkpoints: read where they lie, written so that torch and unzip find them sound."""

import io
import pickle
import zipfile

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

from paralign.engine.checkpoint.dcpfile import CheckpointFiles, CheckpointFileWriter, write_metadata
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
