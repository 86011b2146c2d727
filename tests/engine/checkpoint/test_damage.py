"""Every kind of file of a model on disk, damaged in every way: told by `verify` and by `convert`, or harmless."""

import json
import random
import shutil
from functools import partial

import pytest
import torch

from paralign.engine.checkpoint.convert import convert
from paralign.engine.checkpoint.hf import (
    Assets,
    HFReader,
    StageWriter,
    copy_assets,
    finish_export,
    shard_plan,
)
from paralign.engine.checkpoint.merge import load_merge, merge
from paralign.engine.checkpoint.source import check_share, open_source
from paralign.engine.checkpoint.verify import check_against_manifest, compare
from paralign.models.errors import ParalignError, WeightsError

from ...tiny import random_model, write_tokenizer


def flip(content, at):
    changed = bytearray(content)
    changed[at] ^= 1 << (at % 8)
    return bytes(changed)


DAMAGES = {
    "bit": lambda content: flip(content, len(content) * 6 // 10),
    "cut": lambda content: content[: len(content) // 2],
    "gone": lambda content: None,
    "zeroes": lambda content: bytes(len(content)),
}
# What `convert` does not tell, and why it need not.
HARMLESS = {
    ("manifest.json", "gone"): "all it described is as it was; what convert then reads is checked without it",
}
FORMS = ("converted", "native", "export")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model as convert writes it in either form, and as a run exports it in two stages."""
    root = tmp_path_factory.mktemp("models")
    source = root / "source"
    random_model("llama", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(source)
    words = ["<unk>", "hello", "<eos>"]
    write_tokenizer(source, words, unk_token="<unk>", eos_token="<eos>", chat_template="{{ messages }}")
    convert(source, root / "converted", to="hf", max_shard_size="6KB", progress=False)
    convert(source, root / "native", max_shard_size="6KB", progress=False)
    reader, export = HFReader(source), root / "export"
    stages = [reader.rules[:4], reader.rules[4:]]
    plan = shard_plan(stages, dtype=torch.bfloat16, max_shard_bytes=10**6)
    for stage, rules in enumerate(stages):
        writer = StageWriter(export, plan, stage)
        for rule in rules:
            for name in rule.hf:
                writer.add(name, reader.read(name))
        writer.close()
    copy_assets(Assets(source, source), export, dtype="bfloat16")
    finish_export(export, plan)
    return root


def files_of(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def verify(directory):
    """What `paralign verify` says is wrong, in words; empty if nothing."""
    try:
        return "; ".join(f"{fault.name}: {fault.what}" for fault in check_against_manifest(directory))
    except ParalignError as error:
        return str(error)


def refusal(directory, out):
    """Why `paralign convert` refuses; empty if it does not."""
    try:
        convert(directory, out, progress=False)
    except ParalignError as error:
        return str(error)
    return ""


def damaged(models, form, tmp_path, file, damage):
    directory = tmp_path / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(models / form, directory)
    content = damage((directory / file).read_bytes())
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_bytes(content)
    return directory


@pytest.mark.parametrize("form", FORMS)
def test_what_is_whole_is_found_whole(models, form, tmp_path):
    assert check_against_manifest(models / form) == []
    convert(models / form, tmp_path / "out", progress=False)
    assert compare(models / "source", tmp_path / "out") == []


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", FORMS)
def test_no_damage_of_a_file_is_silent(models, form, damage, tmp_path):
    silent = {}
    for file in files_of(models / form):
        directory = damaged(models, form, tmp_path, file, DAMAGES[damage])
        assert verify(directory), f"verify does not tell of {file}"
        if error := refusal(directory, tmp_path / "out"):
            assert file in error, error
            assert not (tmp_path / "out").exists()
            assert not (tmp_path / ".out.part").exists()
        else:
            silent[file, damage] = compare(models / "source", tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
    assert silent == {place: [] for place in HARMLESS if place[1] == damage}


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_anywhere_in_the_weights_is_told_or_changes_no_tensor(models, form, tmp_path):
    """Headers and archives too: what is not told lies in what no reader of weights uses."""
    rng = random.Random(7)
    files = [file for file in files_of(models / form) if file.endswith((".safetensors", ".distcp"))]
    told_of = 0
    for trial in range(60):
        file = rng.choice(files)
        size = (models / form / file).stat().st_size
        at = rng.randrange(min(size, 900) if trial % 2 else size)
        directory = damaged(models, form, tmp_path, file, partial(flip, at=at))
        if verify(directory):
            told_of += 1
        else:
            assert compare(directory, models / "source") == []
    assert told_of > 30


def spoil(directory, name, bit=0):
    """Flips a bit of a tensor in a Hugging Face directory; returns the file."""
    file = HFReader(directory)._files[name]
    at = file._entries[name].start
    content = bytearray(file.path.read_bytes())
    content[at] ^= 1 << bit
    file.path.write_bytes(content)
    return file.path.name


def test_the_error_names_file_and_tensor_also_where_the_bit_makes_an_inf(models, tmp_path):
    shutil.copytree(models / "export", tmp_path / "src")
    name = "model.layers.0.mlp.up_proj.weight"
    path = tmp_path / "src" / spoil(tmp_path / "src", name)
    content = bytearray(path.read_bytes())
    at = HFReader(tmp_path / "src")._files[name]._entries[name].start
    content[at : at + 2] = (
        torch.tensor([float("inf")], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    )
    path.write_bytes(content)
    for read_back in (True, False):
        with pytest.raises(WeightsError, match=rf"{path.name}: {name}: other values; .*copy the file again"):
            convert(tmp_path / "src", tmp_path / "out", verify=read_back, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_parent_that_is_broken_is_not_merged(models, tmp_path):
    shutil.copytree(models / "converted", tmp_path / "parent")
    file = spoil(tmp_path / "parent", "model.norm.weight")
    (tmp_path / "merge.yaml").write_text(
        f"merge_method: linear\nmodels:\n- model: {models / 'native'}\n- model: {tmp_path / 'parent'}\n"
    )
    with pytest.raises(WeightsError, match=rf"parent/{file}: model.norm.weight: other values"):
        merge(load_merge(tmp_path / "merge.yaml"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_edited_config_is_taken_once_its_entry_is_gone(models, tmp_path):
    """The remedy that the error names."""
    shutil.copytree(models / "export", tmp_path / "src")
    config = tmp_path / "src/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 32}))
    with pytest.raises(WeightsError, match=r"src/config\.json: \d+ bytes, expected .*take its entry out"):
        convert(tmp_path / "src", tmp_path / "out", progress=False)
    manifest = json.loads((tmp_path / "src/manifest.json").read_text())
    del manifest["files"]["config.json"]
    (tmp_path / "src/manifest.json").write_text(json.dumps(manifest))
    convert(tmp_path / "src", tmp_path / "out", progress=False)


def test_ranks_that_start_from_weights_find_the_broken_tensor_together(models, tmp_path):
    for form in ("export", "native"):
        for rank in range(3):
            check_share(open_source(models / form), rank, 3)
    shutil.copytree(models / "export", tmp_path / "src")
    spoil(tmp_path / "src", "model.embed_tokens.weight")
    found = []
    for rank in range(3):
        try:
            check_share(open_source(tmp_path / "src"), rank, 3)
        except WeightsError as error:
            found.append(str(error))
    assert len(found) == 1
    assert "model.embed_tokens.weight: other values" in found[0]
