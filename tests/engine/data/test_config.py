from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from paralign.engine.config.decoding import decode
from paralign.engine.data.config import DataConfig
from paralign.models.errors import RecipeError


def test_one_path_is_a_list_of_one(data_config: Callable[..., DataConfig]):
    def paths(train: object) -> list[Path]:
        return [source.path for source in data_config(Path("a"), train=train).train]

    assert paths("b.json") == paths({"path": "b.json"}) == [Path("b.json")]
    assert paths(["b.json", {"path": "c", "weight": 2}]) == [Path("b.json"), Path("c")]


def test_a_template_is_a_name_or_a_path(data_config: Callable[..., DataConfig]):
    assert data_config(Path("a"), chat_template="llama3").chat_template == "llama3"
    assert data_config(Path("a"), chat_template="my.jinja").chat_template == Path("my.jinja")


@pytest.mark.parametrize("keys", [{"train": []}, {"tokens_per_pack": 1}, {"workers": -1}, {"packing": True}])
def test_what_cannot_be_meant_is_refused(data_config: Callable[..., DataConfig], keys: dict[str, object]):
    with pytest.raises(ValidationError):
        data_config(Path("a"), **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"train": [{"path": "a", "weight": 0}, {"path": "b", "weight": 0.0}]},
            "every weight in data.train is 0",
        ),
        ({"train": {"path": "a", "weight": -1}}, "greater than or equal to 0"),
        ({"train": {"path": "a", "weight": float("inf")}}, "finite"),
        ({"train": {"path": "a", "name": "a/b"}}, "match"),
        ({"train": {"name": "a"}}, "path"),
        ({"train": {"path": "a", "columns": {"message": "b"}}}, "'messages'"),
        ({"validation": {"code": {"path": "a", "weight": 2}}}, "data.validation.code has weight 2"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(
    data_config: Callable[..., DataConfig], keys: dict[str, object], message: str
):
    with pytest.raises(ValidationError) as caught:
        data_config(Path("a"), **keys)
    assert message in str(caught.value)


def test_a_source_is_named_by_its_file(data_config: Callable[..., DataConfig]):
    config = data_config(Path("x"), train=["a/b c.jsonl", {"path": "saved/set", "name": "mine"}])
    assert [source.name for source in config.train] == ["b_c", "mine"]
    again = DataConfig.model_validate(config.model_dump(mode="json"))
    assert again == config


def test_the_sets_of_a_recipe_are_named(data_config: Callable[..., DataConfig]):
    config = data_config(Path("a"), validation={"code": "b", "math": {"path": "c", "format": "alpaca"}})
    assert {name: [source.path for source in sources] for name, sources in config.sets.items()} == {
        "train": [Path("a")],
        "validation/code": [Path("b")],
        "validation/math": [Path("c")],
    }


def test_a_misspelt_key_of_a_source_is_named_with_a_proposal(data_config: Callable[..., DataConfig]):
    tree = data_config(Path("a")).model_dump(mode="json")
    tree["train"] = [{"path": "a", "wieght": 2}]
    tree["validation"] = {"code": {"path": "b", "column": {}}}
    with pytest.raises(RecipeError) as caught:
        decode(DataConfig, tree, {("train", 0): "x.yaml:3"}, Path("x.yaml"))
    assert str(caught.value).splitlines() == [
        "x.yaml:3 train[0].wieght: unknown key; did you mean weight?",
        "x.yaml validation.code.column: unknown key; did you mean columns?",
    ]
