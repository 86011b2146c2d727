"""What is read of a tokenizer's files: ids, vocabularies, the token that pads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paralign.engine.data.tokenizer import largest_id, padding_token, vocabulary
from paralign.models.errors import RecipeError, WeightsError


def write(directory: Path, special: tuple[str, ...], **config: str) -> Path:
    """A tokenizer of three words, ids 0 to 2, and of special tokens from id 3 on."""
    from tokenizers import AddedToken, Tokenizer, models

    directory.mkdir()
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hi": 1, "yo": 2}, "[UNK]"))
    words.add_special_tokens([AddedToken(text, special=True) for text in special])
    words.save(str(directory / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("special", "config", "ends", "vocab_size", "expected"),
    [
        (("<end>", "<own>"), {"pad_token": "<own>"}, {3}, 9, ("<own>", 4)),
        (("<end>", "<|finetune_pad|>"), {"pad_token": "<end>"}, {3}, 9, ("<|finetune_pad|>", 4)),
        (("<reserved_7>", "<end>", "<|pad|>"), {}, {4}, 9, ("<|pad|>", 5)),
        (("<reserved_7>", "<end>", "<|pad|>"), {}, {4}, 5, ("<reserved_7>", 3)),
        (("<end>", "<own>"), {"pad_token": "hi"}, {3}, 9, ("hi", 1)),
    ],
)
def test_the_token_that_pads_ends_no_answer_and_is_the_models(
    tmp_path, special, config, ends, vocab_size, expected
):
    directory = write(tmp_path / "model", special, **config)
    assert padding_token(directory, ends=ends, vocab_size=vocab_size) == expected


def test_without_a_token_to_pad_the_error_names_the_tokenizers_own(tmp_path):
    directory = write(tmp_path / "model", ("<end>",), pad_token="<end>")
    with pytest.raises(RecipeError, match=r'is "<end>", .*add a special token such as'):
        padding_token(directory, ends={3}, vocab_size=9)


def test_vocabularies_are_equal_where_every_token_has_the_same_id(tmp_path):
    one, two = (write(tmp_path / name, ("<end>",)) for name in ("one", "two"))
    other = write(tmp_path / "other", ("<stop>",))
    assert vocabulary(one) == vocabulary(two) != vocabulary(other)
    assert largest_id(one) == 3
    assert (largest_id(tmp_path), vocabulary(tmp_path)) == (-1, None)


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    for read in (largest_id, vocabulary):
        with pytest.raises(WeightsError, match=r"tokenizer\.json: not a tokenizer of the tokenizers library"):
            read(tmp_path)
