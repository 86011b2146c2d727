"""A conversation: the formats of its record, and the order of its turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

from paralign.models.errors import DataError

from .turns import MOST_KEYS, Message, cut, did_you_mean, read_tools, read_turn, read_turns, shown, text

RecordFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion"]
Column = Literal[
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "system",
    "tools",
    "chosen",
    "rejected",
    "label",
    "chosen_score",
    "rejected_score",
    "margin",
]

# What a record of each format must have. The first format whose keys are all there is the record's.
REQUIRED: dict[RecordFormat, tuple[Column, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one sample.

    Attributes:
        messages: in order.
        place: where they were read, `file:line`.
        tools: definitions that the assistant may call, in OpenAI's form.
        n_context: turns at the beginning that are never learned, as those of a prompt with a completion.
    """

    messages: tuple[Message, ...]
    place: str
    tools: tuple[dict[str, Any], ...] = ()
    n_context: int = 0


def rename(record: object, columns: Mapping[Column, str]) -> object:
    """`record` under our names: for each entry `ours: theirs`, the value of key `theirs`."""
    if not columns or not isinstance(record, Mapping):
        return record
    taken = {*columns, *columns.values()}
    kept = {key: value for key, value in record.items() if key not in taken}
    return kept | {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}


def detect_format(record: object, place: str) -> RecordFormat:
    """The format whose keys `record` has; DataError if it has those of none."""
    if isinstance(record, Mapping):
        for name, keys in REQUIRED.items():
            if all(key in record for key in keys):
                return name
    if isinstance(record, Mapping):
        found = "the keys " + cut(", ".join(map(str, islice(record, MOST_KEYS))))
    else:
        found = shown(record)
    raise DataError(
        f"{place}: read {found}; expected an object with "
        + ", or with ".join(" and ".join(keys) for keys in REQUIRED.values())
        + (did_you_mean(record, [key for keys in REQUIRED.values() for key in keys]) or "; see `columns`")
    )


def read_record(record: object, record_format: RecordFormat, place: str) -> Conversation:
    """The conversation written in `record`, under our names of columns.

    Any format may have `tools` and `system` next to its own keys; other keys are passed over.

        messages            OpenAI's turns; content is text or a list of text parts
        sharegpt            `conversations`: turns with from and value
        alpaca              instruction and output, perhaps input and history (pairs of question and answer)
        prompt_completion   each is text (a turn of the user, of the assistant) or turns; only the completion
                            is learned

    Raises:
        DataError: place, key, what was read, what was expected.
    """
    if not isinstance(record, Mapping) or any(key not in record for key in REQUIRED[record_format]):
        found = detect_format(record, place)
        raise DataError(
            f"{place}: read a record of format {found} in a file of format {record_format}; "
            "expected one format per file; split the file"
        )
    fields = cast(Mapping[str, Any], record)
    prompt: tuple[Message, ...] = ()
    if record_format == "messages":
        turns = read_turns(fields["messages"], f"{place} messages")
    elif record_format == "sharegpt":
        turns = read_turns(fields["conversations"], f"{place} conversations")
    elif record_format == "alpaca":
        turns = _from_alpaca(fields, place)
    else:
        prompt = text_or_turns(fields["prompt"], "user", f"{place} prompt")
        turns = text_or_turns(fields["completion"], "assistant", f"{place} completion")
    return conversation_of(fields, prompt, turns, place)


def conversation_of(
    record: Mapping[str, Any], prompt: tuple[Message, ...], turns: tuple[Message, ...], place: str
) -> Conversation:
    """Turns behind those of a prompt, which are never learned, with the record's `system` and `tools`.

    Raises:
        DataError: turns in an order that no template may be trusted to refuse.
    """
    if record.get("system"):
        system = Message("system", text(record["system"], f"{place} system"))
        prompt, turns = ((system, *prompt), turns) if prompt else ((), (system, *turns))
    tools = read_tools(record.get("tools"), f"{place} tools")
    conversation = Conversation(prompt + turns, place, tools, n_context=len(prompt))
    _check_order(conversation)
    return conversation


def _from_alpaca(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    messages: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{place} history: read {shown(history)}; expected a list of [question, answer]")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{place} history[{i}]: read {shown(pair)}; expected [question, answer]")
        messages.append(Message("user", text(pair[0], f"{place} history[{i}][0]")))
        messages.append(Message("assistant", text(pair[1], f"{place} history[{i}][1]")))
    question = text(record["instruction"], f"{place} instruction")
    if record.get("input"):
        question += "\n" + text(record["input"], f"{place} input")
    messages.append(Message("user", question))
    messages.append(Message("assistant", text(record["output"], f"{place} output")))
    return tuple(messages)


def text_or_turns(value: object, role: Literal["user", "assistant"], place: str) -> tuple[Message, ...]:
    """Text is one turn of `role`; else a turn or a list of turns."""
    if isinstance(value, str):
        return (Message(role, value),)
    return (read_turn(value, place),) if isinstance(value, Mapping) else read_turns(value, place)


def _check_order(conversation: Conversation) -> None:
    messages, place = conversation.messages, conversation.place
    calling = False  # whether tool turns may follow
    for i, message in enumerate(messages):
        opening = i == 0 or (i == 1 and messages[0].role == "system")
        if message.role == "system" and i > 0:
            raise DataError(
                f"{place}: turn {i} is of the system again; expected at most one such turn, the first; "
                "join them, or split the conversation"
            )
        if opening and message.role in ("assistant", "tool"):
            raise DataError(
                f"{place}: turn {i} is the first after the system's and of the {message.role}; expected the "
                "user to begin; remove the turn, or put the question before it"
            )
        if message.tool_calls and not conversation.tools:
            raise DataError(
                f"{place}: turn {i} calls the tool {cut(message.tool_calls[0].name)}, and the record has no tools; "
                "give their definitions under tools"
            )
        if message.role == "tool" and not calling:
            raise DataError(
                f"{place}: turn {i} is of a tool, and no tool was called; expected tool_calls before it"
            )
        calling = bool(message.tool_calls) or (calling and message.role == "tool")
