"""Preference formats, and every bad input of them with the message it gets."""

from __future__ import annotations

import math
from typing import Any

import pytest

from paralign.engine.batch import Kind
from paralign.engine.data.preference import read_preference
from paralign.models.errors import DataError

Q = {"role": "user", "content": "Why?"}


def _turn(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


PAIRS: dict[str, dict[str, Any]] = {
    "TRL, plain": {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    "TRL, turns": {"prompt": [Q], "chosen": [_turn("Because.")], "rejected": [_turn("No.")]},
    "TRL, no prompt": {"chosen": [Q, _turn("Because.")], "rejected": [Q, _turn("No.")]},
    "prompt kept twice": {"prompt": "Why?", "chosen": [Q, _turn("Because.")], "rejected": [Q, _turn("No.")]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "Because."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "hh-rlhf": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
    },
    "messages": {"messages": [Q], "chosen": "Because.", "rejected": "No."},
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_format_of_pairs_says_the_same(name: str) -> None:
    found = read_preference(PAIRS[name], Kind.PAIRS, "x:1")
    said = [[(turn.role, turn.content) for turn in c.messages] for c in found.conversations]
    assert said == [[("user", "Why?"), ("assistant", answer)] for answer in ("Because.", "No.")]
    assert [c.n_context for c in found.conversations] == [1, 1]
    assert all(math.isnan(score) for score in found.scores)


def test_a_dialogue_of_several_turns() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello: there\n\nHuman: Why?\n\nAssistant:"
    found = read_preference({"chosen": f"{start} Because.", "rejected": f"{start} No."}, Kind.PAIRS, "x:1")
    chosen = found.conversations[0]
    assert [turn.content for turn in chosen.messages] == ["Hi", "Hello: there", "Why?", "Because."]
    assert chosen.n_context == 3


@pytest.mark.parametrize(
    "record",
    [
        PAIRS["TRL, plain"] | {"chosen_score": 5, "rejected_score": 2.5},
        {"messages": [Q], "chosen": [_turn("Because.", score=5)], "rejected": [_turn("No.", score=2.5)]},
        {"messages": [Q], "chosen": _turn("Because.", score=5), "rejected": _turn("No.", score=2.5)},
    ],
)
def test_scores(record: dict[str, Any]) -> None:
    assert read_preference(record, Kind.PAIRS, "x:1").scores == (5.0, 2.5)


def test_margin_and_system() -> None:
    record = PAIRS["TRL, plain"] | {"margin": 2, "system": "Be kind."}
    found = read_preference(record, Kind.PAIRS, "x:1")
    assert found.margin == 2.0
    assert found.conversations[1].messages[0].role == "system"
    assert found.conversations[1].n_context == 2


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "completion": "Because.", "label": True},
        {"prompt": [Q], "completion": [_turn("Because.")], "label": True},
        {"messages": [Q, _turn("Because.")], "label": True},
        {
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
            "label": True,
        },
    ],
)
def test_every_format_of_labelled_answers_says_the_same(record: dict[str, Any]) -> None:
    found = read_preference(record, Kind.LABELLED, "x:1")
    (conversation,) = found.conversations
    assert [turn.content for turn in conversation.messages] == ["Why?", "Because."]
    assert conversation.n_context == 1
    assert found.desirable is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": "Because."}, 'x:1: chosen and rejected are equal, "Because."'),
        ({"chosen": "  "}, "x:1 chosen: an empty answer"),
        ({"rejected": ""}, "x:1 rejected: an empty answer"),
        ({"prompt": [Q, _turn("Hm.")], "chosen": []}, "x:1 chosen: read []; expected a list of at least one"),
        ({"chosen": 3}, "x:1 chosen: read 3"),
        ({"chosen": [Q]}, "x:1 chosen: ends with a turn of the user; expected the assistant's answer"),
        (
            {
                "prompt": None,
                "chosen": [Q, _turn("a")],
                "rejected": [{**Q, "content": "Why not?"}, _turn("b")],
            },
            "two prompts that differ, from character 3 of turn 0 on: `Why?` (chosen) and `Why not?`",
        ),
        (
            {"prompt": None, "chosen": [Q, _turn("a"), Q, _turn("c")], "rejected": [Q, _turn("b")]},
            "two prompts that differ: 3 turns (chosen) and 1",
        ),
        (
            {"chosen": [{**Q, "content": "Who?"}, _turn("a")]},
            "x:1 chosen: two prompts that differ, from character 2 of turn 0 on: `Why?` (prompt) and `Who?`",
        ),
        ({"prompt": None, "chosen": "text"}, 'expected turns or text that begins with "Human:"'),
        ({"chosen_score": 3}, "a score for one answer only"),
        ({"chosen_score": "high", "rejected_score": 1}, 'chosen_score: read "high"; expected a number'),
        ({"margin": True}, "margin: read true; expected a number"),
        (
            {"rejected": None, "rejectd": "No."},
            "no rejected; expected an object with chosen and rejected; rejectd:",
        ),
    ],
)
def test_a_pair_that_is_none_is_refused(changes: dict[str, Any], message: str) -> None:
    record = PAIRS["TRL, plain"] | changes
    record = {key: value for key, value in record.items() if value is not None}
    with pytest.raises(DataError) as raised:
        read_preference(record, Kind.PAIRS, "x:1")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Why?", "completion": "a"}, "x:1: no label"),
        (
            {"prompt": "Why?", "completion": "a", "label": 1},
            "x:1 label: read 1; expected true (a good answer)",
        ),
        ({"prompt": "Why?", "completion": "a", "label": "good"}, 'x:1 label: read "good"'),
        ({"prompt": "Why?", "completion": "a", "label": None}, "x:1 label: read null"),
        ({"prompt": "Why?", "completion": " ", "label": True}, "x:1 completion: an empty answer"),
        ({"completion": "a", "label": True}, "x:1: no prompt beside completion"),
        ({"prompt": "Why?", "label": True}, "x:1: no completion"),
        ({"messages": [_turn("a")], "label": True}, "nothing stands before the answer"),
        ([], "x:1: read []; expected an object with label"),
    ],
)
def test_a_labelled_answer_that_is_none_is_refused(record: Any, message: str) -> None:
    with pytest.raises(DataError) as raised:
        read_preference(record, Kind.LABELLED, "x:1")
    assert message in str(raised.value)
