"""Directories that no program has written: one clear error within seconds, never a traceback, never a hang."""

import json

import pytest

from paralign.engine.checkpoint.hf import arch_of
from paralign.models.errors import WeightsError

from ...strange import trials, write_models
from ...tiny import config_keys


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def test_no_strange_directory_ends_in_a_traceback_or_hangs(models, tmp_path):
    found = list(trials(models, tmp_path, seed=1, n=25))
    assert [(done, faults) for done, faults in found if faults] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers: read 1000000000; no model has more than 2,000"),
        ({"num_attention_heads": 2**40}, r"num_attention_heads: read .*; no model has more than 1,024"),
        ({"vocab_size": 10**12}, r"vocab_size: read 1000000000000; no model has more than 2,147,483,647"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers: read -1; expected a whole number above 0"),
        ({"hidden_size": "64"}, r"hidden_size: read '64'; expected a whole number"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps: read nan; expected a number above 0"),
        ({"rope_theta": float("inf")}, r"rope_theta: read inf; expected a number above 0"),
        ({"rope_theta": 10**400}, r"rope_theta: read 1000.*; expected a number above 0"),
        ({"rope_scaling": "x"}, r"rope_scaling: read 'x'; expected an object"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings: read 'no'; expected true or false"),
        ({"architectures": 5}, r"architectures: read 5; expected a list of names"),
        ({"architectures": [["LlamaForCausalLM"]]}, r"architectures: read .*; expected a list of names"),
        ({"architectures": ["\ud800"]}, r"architectures: read "),
        ({"hidden_act": "x" * 10_000}, r"hidden_act: read 'xxx.{,100}; only 'silu'"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "id2label": 7},
            r"id2label: read 7; a reward model has one label",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": 5}, r"layer_types: read 5; only"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": [{}, 1]}, r"layer_types: read \[\{\}, 1\]"),
    ],
)
def test_a_config_of_absurd_values_is_named(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(config_keys() | change))
    with pytest.raises(WeightsError, match=rf"config\.json {words}") as error:
        arch_of(tmp_path)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 5000, "9" * 5000, "\0", "", "[]", '{"a": 1'])
def test_a_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"config\.json: (not JSON|read \w+; expected an object)"):
        arch_of(tmp_path)
