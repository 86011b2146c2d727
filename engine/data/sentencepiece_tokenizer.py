"""A tokenizer kept as `tokenizer.model` alone: the sentencepiece library behind the few methods rendering uses.

It splits text at reserved tokens, and says where in the text each token is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from paralign.models.errors import DataError, WeightsError

from ..files.json_file import read_json

_RESERVED = re.compile(r"<reserved_\d+>")
_SPACE = "\u2581"
TOKENIZER_CLASS = "BaichuanTokenizer"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def is_sentencepiece(directory: Path) -> bool:
    """Whether a directory's tokenizer is one that transformers has no class for, kept as sentencepiece's model."""
    if not (directory / "tokenizer.model").is_file() or (directory / "tokenizer.json").is_file():
        return False
    return _tokenizer_config(directory).get("tokenizer_class") == TOKENIZER_CLASS


class Encoded(NamedTuple):
    """Token ids, and for each the characters (first, end) of the text that it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class AddedToken:
    """A token that no text but its own name is split into."""

    content: str
    special: bool = True


class SentencePieceTokenizer:
    """A sentencepiece model with its reserved tokens, under transformers' names.

    Control tokens and `<reserved_N>` are found in the text before sentencepiece sees it; what lies between is
    tokenised piece by piece, as the published code does with the turns of a chat.

    Raises:
        WeightsError: `tokenizer.model` cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._path = directory / "tokenizer.model"
        try:
            self._model = SentencePieceProcessor(model_file=str(self._path))
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"{self._path}: not a sentencepiece model ({error}); cut off, or a Git LFS pointer?"
            ) from None
        config = _tokenizer_config(directory)
        self.special_tokens_map = {
            name: text for name in NAMES if (text := _text_of(config.get(name))) is not None
        }
        if strange := [name for name, text in self.special_tokens_map.items() if not isinstance(text, str)]:
            raise WeightsError(f"{directory}/tokenizer_config.json {strange[0]}: expected a token's text")
        named = set(self.special_tokens_map.values())
        self._ids = {
            piece: id_
            for id_ in range(self._model.get_piece_size())
            if (piece := self._model.id_to_piece(id_)) in named
            or self._model.is_control(id_)
            or _RESERVED.fullmatch(piece)
        }
        self.added_tokens_decoder = {id_: AddedToken(piece) for piece, id_ in self._ids.items()}
        self.all_special_ids = sorted(self.added_tokens_decoder)
        self.bos_token_id: Any = self._ids.get(self.special_tokens_map.get("bos_token", ""))
        self.eos_token_id: Any = self._ids.get(self.special_tokens_map.get("eos_token", ""))
        self._split = re.compile(
            "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) or r"(?!)"
        )
        template = directory / "chat_template.jinja"
        self.chat_template: Any = (  # text, or a list of several
            template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
        )

    @property
    def backend_tokenizer(self) -> SentencePieceTokenizer:
        """Itself: rendering encodes with what lies behind transformers' classes."""
        return self

    def no_truncation(self) -> None:
        """There is none."""

    def no_padding(self) -> None:
        """There is none."""

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoded:
        """Tokens of a text that already holds its special tokens.

        Raises:
            DataError: the model rewrites text before it splits it, so that tokens have no place in the text.
        """
        assert not add_special_tokens
        encoded = Encoded([], [])
        at = 0
        for match in self._split.finditer(text):
            self._encode_plain(text[at : match.start()], at, encoded)
            encoded.ids.append(self._ids[match[0]])
            encoded.offsets.append(match.span())
            at = match.end()
        self._encode_plain(text[at:], at, encoded)
        return encoded

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of some tokens; special ones by their names, unless they are skipped."""
        parts: list[str] = []
        waiting: list[int] = []
        for id_ in ids:
            if id_ not in self.added_tokens_decoder:
                waiting.append(id_)
                continue
            parts.append(self._text(waiting))
            waiting = []
            if not skip_special_tokens:
                parts.append(self.added_tokens_decoder[id_].content)
        return "".join((*parts, self._text(waiting)))

    def _text(self, ids: list[int]) -> str:
        return b"".join(map(self._bytes, ids)).decode(errors="replace")

    def _bytes(self, id_: int) -> bytes:
        piece = self._model.id_to_piece(id_)
        return (
            bytes([int(piece[3:5], 16)]) if self._model.is_byte(id_) else piece.replace(_SPACE, " ").encode()
        )

    def _encode_plain(self, text: str, first: int, encoded: Encoded) -> None:
        """Tokens of text without special tokens; a token that is part of a character has all of its place."""
        if not text:
            return
        plain = text.replace(_SPACE, " ")
        owner = [i for i, character in enumerate(plain) for _ in character.encode()]
        raw, at = plain.encode(), 0
        for id_ in self._model.encode(plain):
            piece = self._bytes(id_)
            if at == 0 and piece.startswith(b" ") and not raw.startswith(piece):
                piece = piece[1:]  # the space that some models put before everything
            if raw[at : at + len(piece)] != piece:
                raise DataError(
                    f"{self._path}: does not keep text as it is: {text[owner[min(at, len(raw) - 1)] :][:20]!r} "
                    f"becomes {self._model.id_to_piece(id_)!r}; convert it to a tokenizer.json"
                )
            encoded.ids.append(id_)
            start, at = at, at + len(piece)
            begin = first + (owner[start] if start < len(raw) else len(plain))
            encoded.offsets.append((begin, first + owner[at - 1] + 1 if at > start else begin))


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    try:
        content = read_json(path) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} where an object is expected")
        return content
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not JSON: {error}") from None


def _text_of(token: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with it."""
    return token.get("content") if isinstance(token, dict) else token
