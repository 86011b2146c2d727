"""What is known of the files of a tokenizer: their names, the one way to open them, and what is read from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralign.models.errors import RecipeError, WeightsError

from ..files.json_file import read_json
from .sentencepiece_tokenizer import SentencePieceTokenizer, is_sentencepiece

if TYPE_CHECKING:  # transformers costs seconds; `check` must start at once
    from transformers import PreTrainedTokenizerFast

# In the order in which they enter the key of a token cache: another order would make every cache anew.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
OTHER_TEMPLATES = "additional_chat_templates"  # a folder of jinja files, one for each name but "default"
PROCESSOR_TEMPLATE = "chat_template.json"  # not exported: transformers refuses it next to chat_template.jinja


def open_tokenizer(directory: Path) -> PreTrainedTokenizerFast | SentencePieceTokenizer:
    """The tokenizer of a Hugging Face directory, fast or sentencepiece's; WeightsError if it has neither."""
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such directory; expected one with a tokenizer")
    if is_sentencepiece(directory):
        return SentencePieceTokenizer(directory)
    try:
        # Said outright: transformers asks at the terminal where nothing is said, and a "y" runs what the files hold.
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of files that are none, anything
        words = str(error).partition("\n")[0][:300]
        raise WeightsError(
            f"{directory}: no tokenizer can be opened ({type(error).__name__}: {words}); copy it again"
        ) from error
    if not tokenizer.is_fast:
        raise WeightsError(
            f"{directory}: {type(tokenizer).__name__} has no tokenizer.json, which places each token in the "
            "text; convert it to a fast tokenizer"
        )
    return tokenizer


def largest_id(directory: Path) -> int:
    """The largest token id of tokenizer.json, -1 where there is no such file; WeightsError if it cannot be read."""
    if not (directory / "tokenizer.json").is_file():
        return -1
    tokens, added = _read_fast(directory)
    ids = tokens.values() if isinstance(tokens, dict) else range(len(tokens))
    return max([*ids, *added.values()], default=-1)


def vocabulary(directory: Path) -> object:
    """Tokens and their ids, equal for equal tokenizers; None where there is no tokenizer.

    Raises:
        WeightsError: tokenizer.json cannot be read.
    """
    sentencepiece = directory / "tokenizer.model"
    if (directory / "tokenizer.json").is_file():
        return "tokenizers", *_read_fast(directory)
    if sentencepiece.is_file():
        return "sentencepiece", hashlib.sha256(sentencepiece.read_bytes()).hexdigest()
    return None


def padding_token(directory: Path, *, ends: Collection[int], vocab_size: int) -> tuple[str, int]:
    """A token to pad with, and its id: the tokenizer's own, else a special one that is there to pad, or reserved.

    Args:
        ends: tokens that answers end with; none of them can pad.
        vocab_size: of the model; the id is smaller.

    Raises:
        RecipeError: no token can pad.
    """
    tokenizer = open_tokenizer(directory)
    added = tokenizer.added_tokens_decoder.items()
    ids = {token.content: id_ for id_, token in added}
    special = [token.content for _, token in added if token.special]
    own = tokenizer.special_tokens_map.get("pad_token")
    candidates = [own, *(text for word in ("pad", "reserved") for text in special if word in text.lower())]
    for text in candidates:
        if text in ids and ids[text] not in ends and ids[text] < vocab_size:
            return text, ids[text]
    raise RecipeError(
        f"{directory}: no token to pad a reward model's batches with: the tokenizer's is "
        f"{json.dumps(own, ensure_ascii=False)}, and a score is read at the last token that is not padding, so that "
        "it must never end an answer; add a special token such as <|pad|> to the tokenizer"
    )


def _read_fast(directory: Path) -> tuple[Any, dict[str, int]]:
    """The vocabulary in tokenizer.json, a table or a list by id, and the ids of the tokens added to it."""
    path = directory / "tokenizer.json"
    try:
        content = read_json(path)
        tokens = content["model"]["vocab"]
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        ids = [*(tokens.values() if isinstance(tokens, dict) else range(len(tokens))), *added.values()]
        if not all(type(id_) is int for id_ in ids):
            raise ValueError
        return tokens, added
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{path}: not a tokenizer of the tokenizers library; copy it again") from None
