"""A prompt with its answers, and how a record becomes one.

    pairs      `chosen` and `rejected`: answers to `prompt` (text or turns), to `messages` or `conversations`;
               or, without any of these, whole conversations: turns, or a dialogue as text, as in hh-rlhf
    labelled   `completion` with `prompt`, or `messages` or `conversations` whose last turn is the answer;
               `label`, true or false

An answer is text, a turn or turns. Pairs may have scores, `chosen_score` and `rejected_score`, or `score` in the
last turn of each answer, and a `margin`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paralign.models.errors import DataError

from ..batch import Kind
from .conversation import Conversation, conversation_of, text_or_turns
from .turns import Message, cut, did_you_mean, shown

_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")
_PROMPTS = ("prompt", "messages", "conversations")


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with two answers, the better one first, or with one that is labelled.

    Attributes:
        conversations: the prompt with each answer; `n_context` turns are the prompt's.
        desirable: the label; of a pair, that of its first answer.
        scores: absolute, one for each answer; NaN where there are none.
        margin: by how much the first answer is better, at least.
    """

    conversations: tuple[Conversation, ...]
    desirable: bool = True
    scores: tuple[float, ...] = (math.nan,)
    margin: float = 0.0


def read_preference(record: object, kind: Kind, place: str) -> Preference:
    """The preference written in `record`, under our names of columns.

    Raises:
        DataError: place, key, what was read, what was expected; an answer that is empty; two answers that are
            equal; two prompts that differ.
    """
    needed = ("chosen", "rejected") if kind is Kind.PAIRS else ("label",)
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: read {shown(record)}; expected an object with {' and '.join(needed)}")
    for key in needed:
        if key not in record:
            raise DataError(
                f"{place}: no {key}; expected an object with {' and '.join(needed)}{did_you_mean(record, needed)}"
            )
    return _pair(record, place) if kind is Kind.PAIRS else _labelled(record, place)


def _pair(record: Mapping[str, Any], place: str) -> Preference:
    prompt = _prompt(record, place)
    whole = [_prompt_and_answer(prompt, record[key], f"{place} {key}") for key in ("chosen", "rejected")]
    (prompt_c, chosen), (prompt_r, rejected) = whole
    _check_same(prompt_c, prompt_r, place, "chosen")
    if chosen == rejected:
        raise DataError(
            f"{place}: chosen and rejected are equal, {shown(chosen[-1].content)}; expected two answers; "
            "remove the pair"
        )
    return Preference(
        tuple(
            _conversation(record, prompt_c, answer, f"{place} {key}", place)
            for key, answer in (("chosen", chosen), ("rejected", rejected))
        ),
        scores=_scores(record, place),
        margin=_number(record["margin"], f"{place} margin") if record.get("margin") is not None else 0.0,
    )


def _prompt_and_answer(
    prompt: tuple[Message, ...] | None, answer: object, place: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The turns before an answer, and the answer's."""
    if prompt is None and isinstance(answer, str):
        turns = _dialogue(answer, place)
    else:
        turns = text_or_turns(answer, "assistant", place)
    if prompt is not None and turns[0].role == "assistant":
        return prompt, turns
    # The whole conversation; beside a prompt, again, as in sets that keep it twice.
    if turns[-1].role != "assistant":
        raise DataError(f"{place}: ends with a turn of the {turns[-1].role}; expected the assistant's answer")
    if prompt is not None:
        _check_same(prompt, turns[:-1][-len(prompt) :], place, "prompt")
    return turns[:-1], turns[-1:]


def _labelled(record: Mapping[str, Any], place: str) -> Preference:
    label = record["label"]
    if not isinstance(label, bool):
        raise DataError(f"{place} label: read {shown(label)}; expected true (a good answer) or false")
    if "completion" in record:
        prompt = _prompt(record, place)
        if prompt is None:
            raise DataError(f"{place}: no prompt beside completion{did_you_mean(record, _PROMPTS)}")
        answer = text_or_turns(record["completion"], "assistant", f"{place} completion")
        key = "completion"
    else:
        whole = _prompt(record, place)
        if whole is None or "prompt" in record:
            raise DataError(
                f"{place}: no completion; expected prompt and completion, or messages"
                + did_you_mean(record, ("completion", "messages"))
            )
        prompt, answer, key = whole[:-1], whole[-1:], "the last turn"
    return Preference((_conversation(record, prompt, answer, f"{place} {key}", place),), desirable=label)


def _prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...] | None:
    for key in _PROMPTS:
        if key in record:
            return text_or_turns(record[key], "user", f"{place} {key}")
    return None


def _dialogue(value: str, place: str) -> tuple[Message, ...]:
    """hh-rlhf's text: turns that begin with "Human:" or "Assistant:" after an empty line."""
    parts = _SPEAKER.split(value)
    if parts[0].strip() or len(parts) < 3:
        raise DataError(
            f'{place}: read {shown(value)}; without a prompt, expected turns or text that begins with "Human:"'
        )
    roles: dict[str, Literal["user", "assistant"]] = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[1::2], parts[2::2]))


def _conversation(
    record: Mapping[str, Any],
    prompt: tuple[Message, ...],
    answer: tuple[Message, ...],
    answer_place: str,
    place: str,
) -> Conversation:
    for turn in answer:
        if turn.role not in ("assistant", "tool"):
            raise DataError(f"{answer_place}: a turn of the {turn.role}; expected the assistant's answer")
        if turn.role == "assistant" and not (turn.content or "").strip() and not turn.tool_calls:
            raise DataError(f"{answer_place}: an empty answer; expected text; remove the record")
    if not prompt:
        raise DataError(f"{answer_place}: nothing stands before the answer; expected a prompt")
    return conversation_of(record, prompt, answer, place)


def _check_same(ours: Sequence[Message], theirs: Sequence[Message], place: str, where: str) -> None:
    """Two prompts of one pair must be one; an error shows the first character at which they part."""
    for i, (one, other) in enumerate(zip(ours, theirs)):
        if one == other:
            continue
        a, b = one.content or "", other.content or ""
        at = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        start = max(0, at - 20)
        raise DataError(
            f"{place}: two prompts that differ, from character {at} of turn {i} on: `{cut(a[start : at + 20])}` "
            f"({where}) and `{cut(b[start : at + 20])}`; expected one prompt for both answers"
        )
    if len(ours) != len(theirs):
        raise DataError(
            f"{place}: two prompts that differ: {len(ours)} turns ({where}) and {len(theirs)}; expected one "
            "prompt for both answers"
        )


def _scores(record: Mapping[str, Any], place: str) -> tuple[float, float]:
    found: list[float] = []
    for key in ("chosen", "rejected"):
        value, where = record.get(f"{key}_score"), f"{place} {key}_score"
        answer = record[key][-1] if isinstance(record[key], list) and record[key] else record[key]
        if value is None and isinstance(answer, Mapping):
            value, where = answer.get("score"), f"{place} {key} score"
        found.append(math.nan if value is None else _number(value, where))
    if math.isnan(found[0]) != math.isnan(found[1]):
        raise DataError(
            f"{place}: a score for one answer only; expected chosen_score and rejected_score, or none"
        )
    return found[0], found[1]


def _number(value: object, place: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise DataError(f"{place}: read {shown(value)}; expected a number")
    return float(value)
