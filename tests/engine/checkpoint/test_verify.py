"""A manifest says what the weights were; whatever differs from it, or from another model, is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from paralign.engine.checkpoint.convert import convert
from paralign.engine.checkpoint.verify import Difference, check_against_manifest, compare
from paralign.engine.cli import app
from paralign.models.errors import WeightsError

from ...tiny import random_model

NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    random_model("llama", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(root / "source")
    convert(root / "source", root / "hf", to="hf", progress=False)
    convert(root / "source", root / "native", progress=False)
    return root


def changed(source, directory, change):
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("form", ["hf", "native"])
def test_what_convert_wrote_is_as_its_manifest_says(model, form):
    assert check_against_manifest(model / form, workers=2) == []
    manifest = json.loads((model / form / "manifest.json").read_text())
    assert len(manifest["fingerprint"]) == 64
    shapes = {tuple(entry["shape"]) for entry in manifest["tensors"].values()}
    assert {(16,), (37, 16)} <= shapes


def test_one_bit_is_enough(model, tmp_path):
    def flip(tensors):
        tensors[NORM].view(torch.int16)[3] ^= 1

    spoilt = changed(model / "hf", tmp_path / "hf", flip)
    assert check_against_manifest(spoilt) == [Difference(NORM, "other values")]
    found = compare(spoilt, model / "native")
    assert [difference.name for difference in found] == [NORM]
    assert "differ by up to 0.00" in found[0].what


def test_a_dtype_is_a_difference(model, tmp_path):
    other = changed(model / "hf", tmp_path / "hf", lambda t: t.update({NORM: t[NORM].float()}))
    assert check_against_manifest(other) == [Difference(NORM, "float32, expected bfloat16")]
    assert compare(other, model / "hf") == [Difference(NORM, "float32 and bfloat16")]


def test_no_manifest_is_told(model):
    with pytest.raises(
        WeightsError, match=r"manifest.json: there is no such file; `paralign convert` and runs write one"
    ):
        check_against_manifest(model / "source")


def test_the_command_exits_by_what_it_finds(model, tmp_path):
    run = CliRunner().invoke
    assert run(app, ["verify", str(model / "hf")]).exit_code == 0
    assert run(app, ["verify", str(model / "source"), str(model / "native")]).exit_code == 0
    spoilt = changed(model / "hf", tmp_path / "hf", lambda t: t[NORM].zero_())
    result = run(app, ["verify", str(spoilt)])
    assert result.exit_code == 1
    assert f"{NORM}: other values" in result.output
    assert run(app, ["verify", str(spoilt), str(model / "source")]).exit_code == 1
