"""A model changes its form bit by bit, or not at all."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paralign.engine.checkpoint import rawfile, writing
from paralign.engine.checkpoint.convert import convert
from paralign.engine.checkpoint.dcpfile import CheckpointFiles
from paralign.engine.checkpoint.file_manifest import digest_directory, write_file_manifest
from paralign.engine.checkpoint.hf import Assets, HFReader, copy_assets
from paralign.engine.checkpoint.target import NativeTarget
from paralign.engine.checkpoint.verify import Difference, check_against_manifest, compare
from paralign.models.errors import CheckpointError, WeightsError
from paralign.models.weights import bit_equal

from ...models.baichuan2_reference import BaichuanConfig, BaichuanForCausalLM
from ...tiny import random_model


def native_state(directory, padded_to=40):
    """Native tensors by name, the vocabulary padded, beside what an optimizer keeps."""
    reader = HFReader(directory)
    state = {}
    for rule in reader.rules:
        tensor = rule.slice(reader.read, 0, 1)
        if tensor.shape[0] == 37:
            tensor = torch.cat([tensor, tensor.new_full((padded_to - 37, *tensor.shape[1:]), 9.0)])
        state[rule.native] = tensor
        state[f"optimizer.state.exp_avg.{rule.native}"] = torch.zeros(tensor.shape)
    return state


def save_checkpoint(directory, source, state):
    dcp.save(state, checkpoint_id=directory, no_dist=True)
    copy_assets(Assets(source, source), directory / "hf", dtype="bfloat16")
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    random_model("llama").to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(tmp_path, source):
    return save_checkpoint(tmp_path / "iter_0000100", source, native_state(source))


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_that_went_in_comes_out(tmp_path, tied):
    original = random_model("qwen2", tie_word_embeddings=tied).to(torch.bfloat16)
    original.save_pretrained(tmp_path / "source")
    src = save_checkpoint(tmp_path / "iter_0000100", tmp_path / "source", native_state(tmp_path / "source"))
    report = convert(src, tmp_path / "out/dst", max_shard_size="4KB", progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out/dst")
    expected = original.state_dict()
    assert all(bit_equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert report.verified
    assert report.files > 2
    assert report.parameters == original.num_parameters()
    assert report.tensor_bytes == 2 * report.parameters
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dst"]


def test_another_dtype_is_cast_once(tmp_path, checkpoint, source):
    convert(checkpoint, tmp_path / "dst", dtype="float32", progress=False)
    written, original = HFReader(tmp_path / "dst"), HFReader(source)
    assert written.arch.dtype == "float32"
    for rule in original.rules:
        for name in rule.hf:
            assert bit_equal(written.read(name), original.read(name).float())


NORM = "decoder.layers.1.input_layernorm.weight"
MISFITS = {
    "missing": (lambda s: s.pop(NORM), f"lacks {NORM}, which hf/config.json"),
    "shape": (lambda s: s.update({NORM: torch.zeros(17)}), rf"{NORM}: found shape \(17,\), .* for \(16,\)"),
    "too few tokens": (
        lambda s: s.update({"output_layer.weight": torch.zeros(36, 16)}),
        r"output_layer.weight: found shape \(36, 16\)",
    ),
    "extra layer": (
        lambda s: s.update({"decoder.layers.2.mlp.linear_fc2.weight": torch.zeros(16, 24)}),
        "holds decoder.layers.2.mlp.linear_fc2.weight",
    ),
    "mixed dtypes": (lambda s: s.update({NORM: s[NORM].float()}), "several dtypes: .* is torch.float32"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, source, what):
    spoil, words = MISFITS[what]
    state = native_state(source)
    spoil(state)
    src = save_checkpoint(tmp_path / "iter_0000100", source, state)
    with pytest.raises(CheckpointError, match=words):
        convert(src, tmp_path / "dst", progress=False)
    assert not (tmp_path / "dst").exists()


def test_what_is_no_finished_checkpoint_is_refused(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match=r".metadata is missing; give .*iter_0000100"):
        convert(tmp_path, tmp_path / "dst", progress=False)
    shard = next(checkpoint.glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=r"distcp: \d+ bytes, .metadata says \d+"):
        convert(checkpoint, tmp_path / "dst", progress=False)
    shard.unlink()
    with pytest.raises(CheckpointError, match="distcp: 0 bytes"):
        convert(checkpoint, tmp_path / "dst", progress=False)
    (checkpoint / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r".metadata is missing; did the save finish"):
        convert(checkpoint, tmp_path / "dst", progress=False)


def test_arguments_are_checked_first(tmp_path, checkpoint):
    with pytest.raises(WeightsError, match="max_shard_size: read 'big'"):
        convert(checkpoint, tmp_path / "dst", max_shard_size="big", progress=False)
    with pytest.raises(WeightsError, match="dtype: read 'bf16'; expected one of float32"):
        convert(checkpoint, tmp_path / "dst", dtype="bf16", progress=False)
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/notes.txt").touch()
    with pytest.raises(WeightsError, match="dst: not empty"):
        convert(checkpoint, tmp_path / "dst", progress=False)


def test_an_empty_directory_is_used(tmp_path, checkpoint):
    (tmp_path / "dst").mkdir()
    convert(checkpoint, tmp_path / "dst", progress=False)
    assert json.loads((tmp_path / "dst/config.json").read_text())["vocab_size"] == 37


class Forgetful(HFReader):
    """A disk that gives back something else."""

    def stored(self, rule):
        return {
            name: [part + 1 for part in parts] if name == "model.layers.1.mlp.up_proj.weight" else parts
            for name, parts in super().stored(rule).items()
        }


def test_a_disk_that_lies_is_noticed_and_leaves_nothing(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(writing, "open_unchecked", Forgetful)
    with pytest.raises(WeightsError, match=r"model.layers.1.mlp.up_proj.weight was not read back"):
        convert(checkpoint, tmp_path / "dst", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000100"]


def test_a_runs_checkpoint_with_a_flipped_bit_is_refused(tmp_path, checkpoint):
    shard = next(checkpoint.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    tensor = CheckpointFiles(checkpoint).read("decoder.layers.1.mlp.linear_fc2.weight")
    content[content.index(bytes(tensor.view(torch.uint8).flatten().tolist())) + 7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(WeightsError, match=r"distcp: decoder.layers.1.mlp.linear_fc2.weight: other bytes"):
        convert(checkpoint, tmp_path / "dst", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000100"]


def test_a_runs_manifest_of_files_is_heeded_where_convert_reads(tmp_path, checkpoint):
    (checkpoint / "common.pt").write_bytes(b"of the optimizer")
    write_file_manifest(checkpoint, digest_directory(checkpoint))
    (checkpoint / "common.pt").unlink()
    convert(checkpoint, tmp_path / "dst", progress=False)
    assert check_against_manifest(checkpoint) == [Difference("common.pt", "missing")]
    (checkpoint / "hf/config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"hf/config.json: 2 bytes, expected \d+, by .*manifest.json"):
        convert(checkpoint, tmp_path / "again", progress=False)


FAMILIES = {
    "llama": {},
    "mistral": {"head_dim": 8, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_equal(tmp_path, family):
    random_model(family, **FAMILIES[family]).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    there = convert(tmp_path / "hf", tmp_path / "native", max_shard_size="4KB", workers=2, progress=False)
    assert (there.kind, there.verified) == ("native", True)
    assert there.files > 2
    convert(tmp_path / "native", tmp_path / "back", progress=False)
    assert compare(tmp_path / "hf", tmp_path / "back") == []
    assert compare(tmp_path / "hf", tmp_path / "native") == []
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_baichuan2_keeps_its_own_config(tmp_path):
    torch.manual_seed(0)
    config = BaichuanConfig(37, 16, 24, 2, 4, model_max_length=64)
    original = BaichuanForCausalLM(config).to(torch.bfloat16)
    (tmp_path / "hf").mkdir()
    keys = config.to_dict() | {
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
        "torch_dtype": "bfloat16",
        "z_loss_weight": 0,
    }
    (tmp_path / "hf/config.json").write_text(json.dumps(keys))
    (tmp_path / "hf/modeling_baichuan.py").write_text("# the published code\n")
    save_file(dict(original.state_dict()), tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "native", progress=False)
    convert(tmp_path / "native", tmp_path / "back", progress=False)
    written = load_file(tmp_path / "back/model.safetensors")
    assert written.keys() == original.state_dict().keys()
    assert all(bit_equal(tensor, written[name]) for name, tensor in original.state_dict().items())
    assert json.loads((tmp_path / "back/config.json").read_text()) == keys
    assert (tmp_path / "back/modeling_baichuan.py").is_file()


def test_torch_reads_what_is_written_as_native(tmp_path, source):
    convert(source, tmp_path / "native", progress=False)
    reader = HFReader(source)
    state = {rule.native: torch.empty(rule.native_shape, dtype=torch.bfloat16) for rule in reader.rules}
    dcp.load(state, checkpoint_id=tmp_path / "native", no_dist=True)
    assert all(bit_equal(state[rule.native], rule.slice(reader.read, 0, 1)) for rule in reader.rules)


def test_another_shard_size_and_dtype_of_the_same_form(tmp_path, source):
    report = convert(
        source, tmp_path / "dst", to="hf", dtype="float32", max_shard_size="4KB", workers=2, progress=False
    )
    assert report.files > 2
    written, original = HFReader(tmp_path / "dst"), HFReader(source)
    for rule in original.rules:
        for name in rule.hf:
            assert bit_equal(written.read(name), original.read(name).float())


def test_what_was_cut_off_goes_on(tmp_path, source, monkeypatch):
    """The second run writes only what the first has not finished, and the result is the same."""
    written = []
    whole = NativeTarget.write

    def dies_at_the_third(self, file, tensors):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file)
        return whole(self, file, tensors)

    monkeypatch.setattr(NativeTarget, "write", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dst", max_shard_size="1KB", progress=False)
    assert not (tmp_path / "dst").exists()
    (tmp_path / ".dst.part" / "weights.part").write_text("of a file that a kill cut off")
    monkeypatch.setattr(NativeTarget, "write", whole)
    report = convert(source, tmp_path / "dst", max_shard_size="1KB", progress=False)
    assert report.resumed == 2
    assert compare(source, tmp_path / "dst") == []
    assert not list(tmp_path.rglob("*.part"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst"]


def test_other_options_do_not_go_on_with_old_files(tmp_path, source, monkeypatch):
    whole = NativeTarget.finish
    monkeypatch.setattr(NativeTarget, "finish", lambda self: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dst", progress=False)
    monkeypatch.setattr(NativeTarget, "finish", whole)
    assert convert(source, tmp_path / "dst", dtype="float32", progress=False).resumed == 0


def test_too_little_room_is_told_before_writing(tmp_path, source, monkeypatch):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match=r"[\d,]{5,} bytes are needed and 1,000 are free"):
        convert(source, tmp_path / "dst", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_told_and_gone_on_with(tmp_path, source, monkeypatch):
    written = []
    pwrite = rawfile.os.pwrite

    def full_after_a_while(fd, data, at):
        written.append(at)
        if len(written) > 40:
            raise OSError(errno.ENOSPC, "no space left on device")
        return pwrite(fd, data, at)

    monkeypatch.setattr(rawfile.os, "pwrite", full_after_a_while)
    with pytest.raises(
        CheckpointError, match=r"dst: .* filled the disk meanwhile; make room and start again"
    ):
        convert(source, tmp_path / "dst", max_shard_size="1KB", progress=False)
    assert not (tmp_path / "dst").exists()
    monkeypatch.setattr(rawfile.os, "pwrite", pwrite)
    assert convert(source, tmp_path / "dst", max_shard_size="1KB", progress=False).resumed > 0
    assert compare(source, tmp_path / "dst") == []


def test_a_value_that_the_dtype_cannot_hold_is_named(tmp_path):
    model = random_model("llama")
    model.model.norm.weight.data[3] = -1e6
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(WeightsError, match=r"final_layernorm.weight: holds 1e\+06, too large for float16"):
        convert(tmp_path / "hf", tmp_path / "dst", dtype="float16", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_same_model_is_the_same_bytes(tmp_path, source):
    for name in ("one", "two"):
        convert(source, tmp_path / name, progress=False)
    (one,), (two,) = (sorted((tmp_path / name).glob("*.distcp")) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(tmp_path, value):
    model = random_model("llama").to(torch.bfloat16)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = value
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(WeightsError, match=r"layers.1.mlp.linear_fc2.weight: holds NaN or Inf"):
        convert(tmp_path / "hf", tmp_path / "dst", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_mixed_dtypes_need_a_choice(tmp_path, source):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    shutil.copytree(source, tmp_path / "hf")
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(WeightsError, match=r"several dtypes: .*norm.weight is torch.float32.*--dtype"):
        convert(tmp_path / "hf", tmp_path / "dst", progress=False)
    convert(tmp_path / "hf", tmp_path / "dst", dtype="bfloat16", progress=False)
    assert compare(source, tmp_path / "dst") == []


def test_two_conversions_do_not_meet(tmp_path, source):
    busy = writing._unfinished(tmp_path / "dst", {})
    with busy, pytest.raises(WeightsError, match="another conversion is writing it"):
        convert(source, tmp_path / "dst", progress=False)


def test_converting_and_merging_import_no_megatron():
    names = ("convert", "merge", "rule_table")
    modules = ", ".join(f"paralign.engine.checkpoint.{name}" for name in names)
    code = f"import sys, {modules}; assert not [n for n in sys.modules if 'megatron' in n]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_user_has_put_aside_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_model("llama").save_pretrained("model")
    for name in ("out.old", "out.old.part", "out.part", "out.aside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text(name)
    convert(Path("model"), Path("out"), progress=False)
    kept = {path.parent.name for path in tmp_path.glob("*/precious.txt")}
    assert kept == {"out.old", "out.old.part", "out.part", "out.aside"}
    assert (tmp_path / "out/.metadata").is_file()
