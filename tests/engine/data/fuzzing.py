"""Wrong data and wrong templates, the same for the same seed."""

# ruff: noqa: E501

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

GOOD = (
    b'{"messages": [{"role": "user", "content": "red one"}, {"role": "assistant", "content": "one red"}]}\n'
)
USER, ANSWER = {"role": "user", "content": "red"}, {"role": "assistant", "content": "one"}
VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, 1e308, "", "x", "\0", "\u2028", "é" * 3000, [], [None], [[]], {}, {"a": {}},
    {"role": "user"}, [USER], [1, "a"], {"type": "text", "text": "x"}, ["x"] * 300, "[" * 2000, "{\"a\":" * 3000,
]  # fmt: skip
RECORDS: list[dict[str, Any]] = [
    {"messages": [USER, ANSWER]},
    {"messages": [{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER], "system": "x"},
    {"conversations": [{"from": "human", "value": "red"}, {"from": "gpt", "value": "one"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["a", "b"]]},
    {"prompt": "a", "completion": [ANSWER]},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": "c", "chosen_score": 1, "rejected_score": 0.5, "margin": 1},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": "{}"}}]}],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    },
]  # fmt: skip


def _messages(*turns: object) -> bytes:
    return json.dumps({"messages": turns}).encode() + b"\n"


# Whole files by what is wrong with them.
FILES: dict[str, bytes] = {
    "empty": b"",
    "newlines": b"\n\n\n",
    "NUL": b"\0\0\0\n",
    "NUL in a line": GOOD.replace(b"red", b"r\0d"),
    "UTF-16": GOOD.decode().encode("utf-16"),
    "Latin-1": GOOD.replace(b"red", b"r\xe9d"),
    "half a pair, escaped": GOOD.replace(b"red", b"\\ud800"),
    "half a pair, escaped twice": _messages(USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{\"x\": \"\\ud800\"}"}]}),
    "half a pair in a key": b'{"\\udc00": 1, "messages": []}\n',
    "half a pair in bytes": GOOD.replace(b"red", b"\xed\xa0\x80"),
    "a pair": GOOD.replace(b"red", b"\\ud83d\\ude00"),
    "cut": GOOD + GOOD[:40],
    "NaN": b'{"messages": NaN}\n',
    "a number": b"5\n",
    "null": b"null\n",
    "deep lists": b"[" * 200_000 + b"]" * 200_000 + b"\n",
    "deep lists in a record": GOOD + b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "deep objects": GOOD + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n",
    "deep arguments": _messages(USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": '{"a":' * 900 + "1" + "}" * 900}]})
    .replace(b'"messages"', b'"tools": [{"name": "a"}], "messages"'),
    "deep text arguments": _messages(USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "[" * 99_999}]}),
    "a long number": b'{"messages": ' + b"9" * 10_000 + b"}\n",
    "a long number in a turn": GOOD + b'{"messages": [{"role": "user", "content": ' + b"1" * 5000 + b"}]}\n",
    "a long number in a list": b'[{"messages": ' + b"9" * 10_000 + b"}]",
    "a long score": b'{"messages": [], "margin": 1' + b"0" * 400 + b"}\n",
    "a key twice": b'{"messages": [], "messages": 5}\n',
    "many keys": json.dumps({f"mesages{i}": i for i in range(100_000)}).encode() + b"\n",
    "a long key": json.dumps({"messages" * 100_000: 1}).encode() + b"\n",
    "a long role": _messages({"role": "user" * 200_000, "content": "a"}),
    "a list not closed": b'[{"messages": []}',
    "a list of numbers": b"[1, 2, 3]",
    "a list, and more": b"[] {}",
    "binary": random.Random(1).randbytes(100_000),
    "binary lines": random.Random(2).randbytes(100_000).replace(b"a", b"\n"),
    "a gigantic line": b'{"messages": "' + b"a" * 3_000_000 + b'"}\n',
    "a gigantic line of junk": b"a" * 80_000_000,
    "a gigantic record of a list": b'[{"messages": "' + b"a" * 3_000_000 + b'"}]',
    "special tokens": _messages({"role": "user", "content": "<|im_end|><|im_start|>assistant"}, ANSWER),
    "a byte order mark inside": GOOD + b"\xef\xbb\xbf" + GOOD,
    "other line ends": GOOD.replace(b"\n", b"\r") * 3,
    "control characters": _messages({"role": "user", "content": "".join(map(chr, range(32)))}, ANSWER),
    "other formats": GOOD + b'{"instruction": "a", "output": "b"}\n',
}  # fmt: skip


def mutated_records(seed: int, n: int) -> Iterator[tuple[str, bytes]]:
    """Files of records, of which one has some value that it should not have, some key less or some byte else."""
    draw = random.Random(seed)
    for i in range(n):
        record = json.loads(json.dumps(draw.choice(RECORDS)))
        if draw.random() < 0.6:
            places = list(_places(record))
            where, key = draw.choice(places)
            if draw.random() < 0.2:
                del where[key]
            else:
                where[key] = draw.choice(VALUES)
            content = json.dumps(record).encode() + b"\n"
        else:
            content = _other_bytes(draw, json.dumps(record).encode()) + b"\n"
        yield f"{i}: {content[:200]!r}", draw.choice([b"", GOOD]) + content + draw.choice([b"", GOOD])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _other_bytes(draw: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at, what = draw.randrange(len(found)), draw.random()
        if what < 0.4:
            found[at] = draw.randrange(256)
        elif what < 0.6 and len(found) > 30:
            del found[at : at + draw.randint(1, 20)]
        elif what < 0.8:
            found[at:at] = bytes(draw.choice(b'{}[]",:\\0\n\xff\x00ud8') for _ in range(draw.randint(1, 8)))
        else:
            found[at:at] = found[max(0, at - 30) : at]
    return bytes(found)


_PIECES: list[Callable[[random.Random], str]] = [
    lambda draw: "{% for a in range(" + str(10 ** draw.choice((0, 1, 2, 3, 5, 9, 12))) + ") %}",
    lambda draw: "{% for m in messages %}",
    lambda draw: "{% endfor %}",
    lambda draw: "{% if " + draw.choice(["m.role == 'user'", "loop.last", "1", "n.x", "messages"]) + " %}",
    lambda draw: "{% endif %}",
    lambda draw: "{% set n = namespace(x='a') %}",
    lambda draw: "{% set n.x = X %}".replace("X", draw.choice(
        ["n.x ~ n.x", "[n.x, n.x]", "n.x + n.x", "n.x * 9999", "n.x | tojson", "{'a': n.x}", "n.x.replace('a', 'aaaa')", "(n.x, n.x)"]
    )),
    lambda draw: "{{ X }}".replace("X", draw.choice(
        ["m.content", "n.x", "bos_token", "messages", "m", "loop", f"'a' * {10 ** draw.choice((0, 1, 2, 3, 5, 9, 12))}", "n.x | length",
         f"messages[{draw.randint(-99, 99)}]", "m.content.split('a')", "raise_exception('no')", "n.x | tojson", "m | tojson", "9 ** 99 ** 9",
         f"n.x | center({10 ** draw.choice((0, 1, 2, 3, 5, 9, 12))})", f"'%{10 ** draw.choice((0, 1, 2, 3, 5, 9, 12))}d' % 1", "a(n.x)", "range", "namespace",
         "messages | map(attribute='content') | join(n.x)", "''.__class__", f"m.content | indent({10 ** draw.randint(0, 9)})"]
    )),
    lambda draw: "{% macro a(x) %}",
    lambda draw: "{% endmacro %}",
    lambda draw: "{% generation %}",
    lambda draw: "{% endgeneration %}",
    lambda draw: "{% break %}",
    lambda draw: draw.choice(["<|im_start|>", "\0", "{", "}}", "{#", "é", "{% raw %}", "{%- -%}"]),
]  # fmt: skip


_BEGIN = "{% set n = namespace(x='a') %}{% set m = messages[-1] %}{% macro a(x) %}{{ x }}{% endmacro %}"


def templates(seed: int, n: int) -> Iterator[str]:
    """Jinja of many pieces, most of it well formed, much of it without an end."""
    draw = random.Random(seed)
    ends = {
        "for": "{% endfor %}",
        "if ": "{% endif %}",
        "mac": "{% endmacro %}",
        "gen": "{% endgeneration %}",
    }
    for _ in range(n):
        pieces = [draw.choice(_PIECES)(draw) for _ in range(draw.randint(2, 16))]
        if draw.random() < 0.7:  # close what is open
            waiting: list[str] = []
            closed = []
            for piece in pieces:
                kind = piece[3:6] if piece.startswith("{% ") else ""
                if kind in ends:
                    waiting.append(ends[kind])
                elif piece in ends.values():
                    if not waiting or waiting[-1] != piece:
                        continue
                    waiting.pop()
                closed.append(piece)
            pieces = closed + waiting[::-1]
        yield _BEGIN + "".join(pieces) + "{{ messages[0].content }}<|im_end|>"
