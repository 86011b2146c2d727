"""Merges of whole models: MergeKit's words, streamed into a directory that says what went in."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paralign.engine.checkpoint.convert import convert
from paralign.engine.checkpoint.merge import load_merge, merge
from paralign.engine.checkpoint.verify import check_against_manifest, compare
from paralign.models.errors import RecipeError, WeightsError

from ...tiny import random_model

TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "</s>", "id": 2}]}
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """`base`, `one`, `two` and `three`, of one tokenizer."""
    root = tmp_path_factory.mktemp("parents")
    for seed, name in enumerate(("base", "one", "two", "three")):
        random_model("llama", seed=seed).save_pretrained(root / name)
        (root / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return root


def config(tmp_path, **keys):
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(keys))
    return load_merge(path)


def entries(parents, *names, **parameters):
    each = [{name: values[i] for name, values in parameters.items()} for i in range(len(names))]
    return [{"model": str(parents / name), "parameters": each[i]} for i, name in enumerate(names)]


def merged_tensor(tmp_path, name=NORM):
    return load_file(tmp_path / "out/model.safetensors")[name]


def original(parents, model, name=NORM):
    return load_file(parents / model / "model.safetensors")[name].double()


UP = "model.layers.1.mlp.up_proj.weight"


def test_linear_by_weights(tmp_path, parents):
    merge(
        config(tmp_path, merge_method="linear", models=entries(parents, "one", "two", weight=[1.0, 3.0])),
        tmp_path / "out",
        progress=False,
    )
    expected = 0.25 * original(parents, "one", UP) + 0.75 * original(parents, "two", UP)
    torch.testing.assert_close(merged_tensor(tmp_path, UP).double(), expected, rtol=1e-6, atol=1e-7)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_parameters_above_are_defaults_and_lambda_is_a_word_of_theirs(tmp_path, parents):
    models = [{"model": str(parents / "one")}, *entries(parents, "two", weight=[0.5])]
    parameters = {"weight": 1.0, "lambda": 0.5, "normalize": False}
    merge(
        config(
            tmp_path,
            merge_method="task_arithmetic",
            base_model=str(parents / "base"),
            models=models,
            parameters=parameters,
        ),
        tmp_path / "out",
        progress=False,
    )
    base, one, two = (original(parents, name, UP) for name in ("base", "one", "two"))
    expected = base + 0.5 * ((one - base) + 0.5 * (two - base))
    torch.testing.assert_close(merged_tensor(tmp_path, UP).double(), expected, rtol=1e-6, atol=1e-7)


METHODS = {
    "task_arithmetic": {},
    "model_stock": {"filter_wise": True},
    "slerp": {"t": 0.5},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_result_does_not_depend_on_form_shards_or_workers(tmp_path, parents, method):
    names = ["one"] if method == "slerp" else ["one", "two"]
    for name in ["base", *names]:
        convert(parents / name, tmp_path / "native" / name, progress=False)
    outs = []
    for root, options in ((parents, {}), (tmp_path / "native", {"max_shard_size": "1KB", "workers": 2})):
        loaded = config(
            tmp_path,
            merge_method=method,
            base_model=str(root / "base"),
            models=entries(root, "base", *names),
            parameters=METHODS[method],
        )
        outs.append(tmp_path / f"out{len(outs)}")
        merge(loaded, outs[-1], progress=False, **options)
    assert compare(*outs) == []
    assert compare(outs[0], parents / "base") != []


def test_manifest_and_card_say_what_went_in(tmp_path, parents):
    merge(
        config(
            tmp_path,
            merge_method="ties",
            base_model=str(parents / "base"),
            models=entries(parents, "one", "two"),
            dtype="bfloat16",
        ),
        tmp_path / "out",
        to="native",
        progress=False,
    )
    assert check_against_manifest(tmp_path / "out") == []
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [entry["model"] for entry in manifest["parents"]] == [
        str(parents / name) for name in ("base", "one", "two")
    ]
    convert(parents / "one", tmp_path / "one", to="hf", progress=False)
    own = json.loads((tmp_path / "one/manifest.json").read_text())["fingerprint"]
    assert manifest["parents"][1]["fingerprint"] == own
    card = (tmp_path / "out/README.md").read_text()
    assert "merge_method: ties" in card
    assert own[:16] in card
    assert "dtype: bfloat16" in card


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"merge_method": "tie"}, "expected linear, .*did you mean ties"),
        ({"base_modell": "x"}, "unknown key; did you mean base_model"),
        ({"parameters": {"lamda": 1}}, "unknown key; did you mean lambda"),
        ({"slices": []}, "unknown key"),
        ({"base_model": None}, "merge_method ties needs base_model"),
        ({"merge_method": "linear"}, "linear takes no base_model"),
        ({"merge_method": "slerp"}, "slerp needs parameters.t and one model besides base_model; there are 2"),
        ({"merge_method": "model_stock", "models": [{"model": "a"}]}, "needs two models or more"),
        ({"models": [{"model": "base"}]}, "only base_model is named"),
        ({"parameters": {"weight": 0.0}}, "the weights 0, 0 sum to zero"),
        (
            {"models": [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 1.0), ("b", -1.0))]},
            "the weights 1, -1 sum to zero",
        ),
        ({"models": [{"model": "a", "parameters": {"weight": [0, 1]}}]}, r"weight: read \[0, 1\]; .*number"),
        ({"parameters": {"density": 1.5}}, "at most 1"),
    ],
)
def test_a_merge_that_cannot_be_is_refused_with_its_line(tmp_path, keys, words):
    good = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}
    with pytest.raises(RecipeError, match=rf"merge.yaml.*{words}"):
        config(tmp_path, **{**good, **keys})


def test_models_of_unlike_shapes_or_tokenizers_are_refused(tmp_path, parents):
    random_model("llama", intermediate_size=32).save_pretrained(tmp_path / "wide")
    shutil.copytree(parents / "two", tmp_path / "renamed")
    other = {**TOKENIZER, "model": {"vocab": {"a": 1, "b": 0}}}
    (tmp_path / "renamed/tokenizer.json").write_text(json.dumps(other))
    shutil.copytree(parents / "two", tmp_path / "turned")
    keys = json.loads((tmp_path / "turned/config.json").read_text())
    keys["rope_theta"] = 5e5
    keys.pop("rope_parameters", None)
    (tmp_path / "turned/config.json").write_text(json.dumps(keys))
    for name, words in (
        ("wide", r"gate_proj.weight: shape \(24, 16\) in .*one, \(32, 16\) in .*wide"),
        ("renamed", "different tokenizers: one token would mean two things"),
        ("turned", "differ in rope_theta of config.json"),
    ):
        models = [{"model": str(parents / "one")}, {"model": str(tmp_path / name)}]
        with pytest.raises(WeightsError, match=words):
            merge(config(tmp_path, merge_method="linear", models=models), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_parents_of_several_dtypes_need_a_choice(tmp_path, parents):
    shutil.copytree(parents / "two", tmp_path / "half")
    tensors = {name: t.bfloat16() for name, t in load_file(tmp_path / "half/model.safetensors").items()}
    save_file(tensors, tmp_path / "half/model.safetensors")
    models = [{"model": str(parents / "one")}, {"model": str(tmp_path / "half")}]
    with pytest.raises(WeightsError, match=r"several dtypes: .*set dtype in the merge file"):
        merge(config(tmp_path, merge_method="linear", models=models), tmp_path / "out", progress=False)
    loaded = config(tmp_path, merge_method="linear", models=models, dtype="float32")
    merge(loaded, tmp_path / "out", progress=False)


def test_nan_in_a_parent_is_named_and_leaves_nothing(tmp_path, parents):
    shutil.copytree(parents / "two", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan/model.safetensors")
    tensors[UP][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan/model.safetensors")
    models = [{"model": str(parents / "one")}, {"model": str(tmp_path / "nan")}]
    with pytest.raises(WeightsError, match=f"{UP}: holds NaN or Inf"):
        merge(config(tmp_path, merge_method="linear", models=models), tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "nan"]
