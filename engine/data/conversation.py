"""A conversation, and how a record of JSON becomes one. Owns the meaning of records, not the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, cast, get_args

from paralign.models.errors import DataError

Role = Literal["system", "user", "assistant"]
RecordFormat = Literal["messages", "alpaca"]

ROLES: tuple[Role, ...] = get_args(Role)
# Keys that would change what is learned if they were passed over in silence.
UNSUPPORTED = {
    "tools": "tool definitions are not rendered",
    "tool_calls": "tool calls are not rendered",
    "function_call": "tool calls are not rendered",
    "weight": "losses are not weighted by turn; `loss_on` chooses the turns",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one sample, in order, and where they were read (`file:line`)."""

    messages: tuple[Message, ...]
    place: str


def detect_format(record: object, place: str) -> RecordFormat:
    """The format whose keys `record` has; DataError if it is neither."""
    if isinstance(record, Mapping):
        if "messages" in record:
            return "messages"
        if "instruction" in record and "output" in record:
            return "alpaca"
    raise DataError(
        f"{place}: read {_shown(record)}; expected an object with messages, or with instruction and output"
        + _did_you_mean(record, ("messages", "instruction", "output"))
    )


def read_record(record: object, record_format: RecordFormat, place: str) -> Conversation:
    """The conversation written in `record`, as decoded from JSON.

    `messages` is OpenAI's form, content a string or a list of text parts. `alpaca` has instruction, input and
    output, and may have system and history (pairs of a question and an answer).

    Raises:
        DataError: place, key, what was read, what was expected.
    """
    found = detect_format(record, place)
    if found != record_format:
        raise DataError(
            f"{place}: read a record of format {found} in a file of format {record_format}; "
            "expected one format per file; split the file"
        )
    fields = cast(Mapping[str, Any], record)
    _refuse_unsupported(fields, place)
    messages = _from_messages(fields, place) if found == "messages" else _from_alpaca(fields, place)
    return Conversation(messages, place)


def _from_messages(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    turns = record["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place} messages: read {_shown(turns)}; expected a list of at least one message")
    return tuple(_message(turn, f"{place} messages[{i}]") for i, turn in enumerate(turns))


def _message(turn: object, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: read {_shown(turn)}; expected an object with role and content")
    _refuse_unsupported(turn, place)
    for key in ("role", "content"):
        if key not in turn:
            raise DataError(f"{place}: no {key}; expected role and content" + _did_you_mean(turn, (key,)))
    role = turn["role"]
    if role not in ROLES:
        close = get_close_matches(str(role).lower(), ROLES, n=1)
        raise DataError(
            f"{place}.role: read {_shown(role)}; expected system, user or assistant"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    return Message(role, _content(turn["content"], f"{place}.content"))


def _content(content: object, place: str) -> str:
    if not isinstance(content, list):
        return _text(content, place)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(f'{place}[{i}]: read {_shown(part)}; expected {{"type": "text", "text": …}}')
        texts.append(_text(part.get("text"), f"{place}[{i}].text"))
    return "".join(texts)


def _from_alpaca(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    messages: list[Message] = []
    if record.get("system"):
        messages.append(Message("system", _text(record["system"], f"{place} system")))
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{place} history: read {_shown(history)}; expected a list of [question, answer]")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{place} history[{i}]: read {_shown(pair)}; expected [question, answer]")
        messages.append(Message("user", _text(pair[0], f"{place} history[{i}][0]")))
        messages.append(Message("assistant", _text(pair[1], f"{place} history[{i}][1]")))
    question = _text(record["instruction"], f"{place} instruction")
    if record.get("input"):
        question += "\n" + _text(record["input"], f"{place} input")
    messages.append(Message("user", question))
    messages.append(Message("assistant", _text(record["output"], f"{place} output")))
    return tuple(messages)


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: read {_shown(value)}; expected text")
    return value


def _refuse_unsupported(record: Mapping[str, Any], place: str) -> None:
    for key, reason in UNSUPPORTED.items():
        if record.get(key):
            raise DataError(f"{place} {key}: {reason}; remove the key, or the record")


def _did_you_mean(record: object, expected: tuple[str, ...]) -> str:
    for key in record if isinstance(record, Mapping) else ():
        close = get_close_matches(str(key).lower(), expected, n=1)
        if close and key not in expected:
            return f"; {key}: did you mean {close[0]}?"
    return ""


def _shown(value: object) -> str:
    """A value as it stood in the file, cut to what fits a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
