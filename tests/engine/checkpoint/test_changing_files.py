"""A file of a model that changes while it is read: an error that says so, and never SIGBUS."""

import os

import pytest
import torch

from paralign.engine.checkpoint.convert import convert
from paralign.engine.checkpoint.source import open_source
from paralign.engine.checkpoint.tensor_digest import digest
from paralign.models.errors import WeightsError

from ...tiny import random_model


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    os.utime(path)


def replace(path):
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.rename(path)


@pytest.fixture(params=["hf", "native"])
def model(request, tmp_path):
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    if request.param == "native":
        convert(tmp_path / "hf", tmp_path / "native", progress=False)
    return tmp_path / request.param


def read_all(source):
    for rule in source.rules:
        for name, parts in source.tensors(rule).items():
            digest(rule.shapes[name], parts, source)


@pytest.mark.parametrize("change", [cut, overwrite, replace, os.unlink])
def test_between_tensors(model, change):
    source = open_source(model)
    read_all(source)
    change(source.files[0])
    for read in (
        lambda: read_all(source),
        source.release,
        lambda: source.read(source.rules[0].hf[0]),
        lambda: [source.native(rule) for rule in source.rules],
    ):
        with pytest.raises(WeightsError, match=r"changed while it was read; .* start again"):
            read()


@pytest.mark.parametrize("change", [cut, overwrite])
def test_under_a_tensor(model, change):
    source = open_source(model)
    tensors = [part for rule in source.rules for part in source.native(rule)]
    change(source.files[0])
    with pytest.raises(WeightsError, match="changed while it was read"):
        list(map(source.own, tensors))


def test_a_conversion_publishes_nothing(model, tmp_path, monkeypatch):
    from paralign.engine.checkpoint import writing

    check = writing._not_finite

    def cut_first(*arguments):
        for path in (*model.glob("*.safetensors"), *model.glob("*.distcp")):
            cut(path)
        return check(*arguments)

    monkeypatch.setattr(writing, "_not_finite", cut_first)
    with pytest.raises(WeightsError, match="changed while it was read"):
        convert(model, tmp_path / "dst", progress=False)
    assert not (tmp_path / "dst").exists()
