from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from paralign.engine.data.config import DataConfig


def test_one_path_is_a_list_of_one(data_config: Callable[..., DataConfig]):
    assert data_config(Path("a.jsonl")).train == (Path("a.jsonl"),)
    assert data_config(Path("a"), train="b.json").train == (Path("b.json"),)
    assert data_config(Path("a"), train=["b.json", "c"]).train == (Path("b.json"), Path("c"))


def test_a_template_is_a_name_or_a_path(data_config: Callable[..., DataConfig]):
    assert data_config(Path("a"), chat_template="llama3").chat_template == "llama3"
    assert data_config(Path("a"), chat_template="my.jinja").chat_template == Path("my.jinja")


@pytest.mark.parametrize("keys", [{"train": []}, {"tokens_per_pack": 1}, {"workers": -1}, {"packing": True}])
def test_what_cannot_be_meant_is_refused(data_config: Callable[..., DataConfig], keys: dict[str, object]):
    with pytest.raises(ValidationError):
        data_config(Path("a"), **keys)
