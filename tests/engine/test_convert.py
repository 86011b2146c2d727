"""A native checkpoint becomes a Hugging Face directory, bit by bit, or nothing at all."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from paralign.engine import convert as convert_module
from paralign.engine.checkpoint.hf import Assets, HFReader, copy_assets
from paralign.engine.convert import convert
from paralign.models.errors import CheckpointError, WeightsError
from paralign.models.weights import bit_equal

SMALL = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


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
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("source")
    LlamaForCausalLM(LlamaConfig(**SMALL)).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(tmp_path, source):
    return save_checkpoint(tmp_path / "iter_0000100", source, native_state(source))


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_that_went_in_comes_out(tmp_path, tied):
    torch.manual_seed(0)
    original = Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=tied)).to(torch.bfloat16)
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


def test_a_disk_that_lies_is_noticed_and_leaves_nothing(tmp_path, checkpoint, monkeypatch):
    class Forgetful(HFReader):
        def read(self, name):
            tensor = super().read(name)
            return tensor + 1 if name == "model.layers.1.mlp.up_proj.weight" else tensor

    monkeypatch.setattr(convert_module, "HFReader", Forgetful)
    with pytest.raises(WeightsError, match=r"decoder.layers.1.mlp.linear_fc1.weight was not read back"):
        convert(checkpoint, tmp_path / "dst", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000100"]


def test_converting_imports_no_megatron():
    code = "import sys, paralign.engine.convert; assert not [n for n in sys.modules if 'megatron' in n]"
    subprocess.run([sys.executable, "-c", code], check=True)
