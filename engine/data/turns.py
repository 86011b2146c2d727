"""One turn of a conversation in OpenAI's or ShareGPT's spelling."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import Any, Literal, get_args

from paralign.models.errors import DataError

from .json_value import json_value

Role = Literal["system", "user", "assistant", "tool"]

ROLES: tuple[Role, ...] = get_args(Role)
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
MOST_KEYS = 50  # of a record, and letters of each, that an error looks at
# Keys that would change what is learned if they were passed over in silence.
UNSUPPORTED = {
    "function_call": "OpenAI's older form of a tool call is not read; write it as tool_calls",
    "weight": "losses are not weighted by turn; `loss_on` chooses the turns; remove the key, or the record",
}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that an assistant turn calls, with its arguments by name.

    Attributes:
        text: the arguments as the record wrote them, if as JSON text.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None
    text: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        content: None only with tool calls.
        tool_calls: of an assistant turn.
        reasoning_content: what an assistant turn thought before it answered.
        tool_call_id, name: of a tool turn: which call it answers, and of which tool.
    """

    role: Role
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def for_template(self, *, json_arguments: bool = False) -> dict[str, Any]:
        """The turn as chat templates expect it; keys without a value are left out, except content.

        Args:
            json_arguments: arguments of tool calls as JSON text, which some templates want.
        """
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": (call.text or json.dumps(call.arguments, ensure_ascii=False))
                        if json_arguments
                        else dict(call.arguments),
                    },
                }
                | ({"id": call.id} if call.id is not None else {})
                for call in self.tool_calls
            ]
        for key in ("reasoning_content", "tool_call_id", "name"):
            if (value := getattr(self, key)) is not None:
                turn[key] = value
        # transformers gives it under both names; templates as that of gpt-oss read the second.
        return turn if self.reasoning_content is None else {"thinking": self.reasoning_content, **turn}


def read_turns(turns: object, place: str) -> tuple[Message, ...]:
    """A list of turns, each in OpenAI's spelling (role, content) or ShareGPT's (from, value).

    Raises:
        DataError: place, key, what was read, what was expected.
    """
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: read {shown(turns)}; expected a list of at least one message")
    return tuple(read_turn(turn, f"{place}[{i}]") for i, turn in enumerate(turns))


def read_turn(turn: object, place: str) -> Message:
    """One turn in either spelling."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: read {shown(turn)}; expected an object with role and content")
    if "role" not in turn and ("from" in turn or "value" in turn):
        return _sharegpt(turn, place)
    for key, rule in UNSUPPORTED.items():
        if turn.get(key):
            raise DataError(f"{place} {key}: {rule}")
    calls = _tool_calls(turn.get("tool_calls"), f"{place}.tool_calls")
    for key in ("role",) if calls else ("role", "content"):
        if key not in turn:
            raise DataError(f"{place}: no {key}; expected role and content" + did_you_mean(turn, (key,)))
    role = turn["role"]
    if role not in ROLES:
        raise DataError(
            f"{place}.role: read {shown(role)}; expected system, user, assistant or tool{_close(role, ROLES)}"
        )
    if calls and role != "assistant":
        raise DataError(f"{place}.tool_calls: read them in a turn of {role}; only an assistant calls tools")
    content = turn.get("content")
    return Message(
        role,
        None if calls and content is None else _content(content, f"{place}.content"),
        calls,
        *(_optional(turn, key, place) for key in ("reasoning_content", "tool_call_id", "name")),
    )


def read_tools(tools: object, place: str) -> tuple[dict[str, Any], ...]:
    """Tool definitions: a list of OpenAI's `{"type": "function", "function": …}` or of bare functions.

    Text is decoded as JSON first; null and the empty list are no tools.
    """
    if isinstance(tools, str):
        tools = _decoded(tools, place, "a JSON list of tools") if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise DataError(f"{place}: read {shown(tools)}; expected a list of tools")
    found = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}[{i}]: read {shown(tool)}; expected a function with a name")
        found.append({"type": "function", "function": dict(function)})
    return tuple(found)


def _sharegpt(turn: Mapping[str, Any], place: str) -> Message:
    for key in ("from", "value"):
        if key not in turn:
            raise DataError(f"{place}: no {key}; expected from and value" + did_you_mean(turn, (key,)))
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        names = ", ".join(SHAREGPT_ROLES)
        raise DataError(
            f"{place}.from: read {shown(speaker)}; expected one of {names}{_close(speaker, SHAREGPT_ROLES)}"
        )
    value = text(turn["value"], f"{place}.value")
    if speaker != "function_call":
        return Message(SHAREGPT_ROLES[speaker], value)
    calls = _decoded(value, f"{place}.value", "a tool call as a JSON object of name and arguments")
    return Message(
        "assistant", None, _tool_calls(calls if isinstance(calls, list) else [calls], f"{place}.value")
    )


def _tool_calls(calls: object, place: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if not isinstance(calls, list):
        raise DataError(f"{place}: read {shown(calls)}; expected a list of tool calls")
    return tuple(_tool_call(call, f"{place}[{i}]") for i, call in enumerate(calls))


def _tool_call(call: object, place: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: read {shown(call)}; expected a function with name and arguments")
    arguments = function.get("arguments", {})
    written = arguments.strip() if isinstance(arguments, str) else None
    if isinstance(arguments, str):  # OpenAI sends them as JSON text; most templates want the object
        arguments = _decoded(arguments, f"{place} arguments", "a JSON object") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{place} arguments: read {shown(arguments)}; expected an object of arguments")
    assert isinstance(call, Mapping)
    return ToolCall(function["name"], arguments, _optional(call, "id", place), written or None)


def _content(content: object, place: str) -> str:
    if not isinstance(content, list):
        return text(content, place)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(f'{place}[{i}]: read {shown(part)}; expected {{"type": "text", "text": …}}')
        texts.append(text(part.get("text"), f"{place}[{i}].text"))
    return "".join(texts)


def text(value: object, place: str) -> str:
    """`value` if it is text; DataError otherwise."""
    if not isinstance(value, str):
        raise DataError(f"{place}: read {shown(value)}; expected text")
    return value


def _optional(turn: Mapping[str, Any], key: str, place: str) -> str | None:
    value = turn.get(key)
    return None if value is None else text(value, f"{place}.{key}")


def _decoded(value: str, place: str, expected: str) -> Any:
    try:
        return json_value(value)
    except ValueError as error:
        found = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{place}: read {shown(value)} ({found}); expected {expected}") from None


def did_you_mean(record: object, expected: Sequence[str]) -> str:
    """The end of an error: which key of `record` may have been meant as one that is expected."""
    for key in islice(record, MOST_KEYS) if isinstance(record, Mapping) else ():
        close = get_close_matches(str(key)[:MOST_KEYS].lower(), expected, n=1)
        if close and key not in expected:
            return f"; {cut(str(key))}: did you mean {close[0]}?"
    return ""


def _close(value: object, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = get_close_matches(cut(str(value)).lower(), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shown(value: object) -> str:
    """A value as it stood in the file, cut to what fits a line."""
    try:
        written = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):
        return "a value that is nested too deeply, or a number with too many digits"
    return cut(written)


def cut(text: str) -> str:
    """Text, cut to what fits a line; half of a surrogate pair, which no terminal takes, as its escape."""
    short = text if len(text) <= 80 else text[:77] + "…"
    return short.encode("utf-8", "backslashreplace").decode()
