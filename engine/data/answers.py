"""What is packed: prompts with their answers, and how many rows they take.

A chat is a prompt of one token with one answer: nothing stands before its first token, so that is never learned.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from ..batch import Column, Head


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt.

    Attributes:
        tokens: (L,), of any integer type, what follows the prompt.
        weights: float32 (L,), what each token counts in the loss: 0 where it is not learned.
        id: of the answer in its data set.
        desirable: its label, where answers have one.
        score: absolute and normalised; NaN where there is none.
    """

    tokens: np.ndarray
    weights: np.ndarray
    id: int = 0
    desirable: bool = False
    score: float = math.nan


@dataclass(frozen=True)
class Group:
    """A prompt, (L,) tokens, at least one, and its answers; in a pair the first is chosen over the second."""

    prompt: np.ndarray
    answers: tuple[Answer, ...]
    margin: float = 0.0

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights of the prompt with its first answer, (L,) each."""
        answer = self.answers[0]
        before = np.zeros(len(self.prompt), dtype=np.float32)
        return np.concatenate((self.prompt, answer.tokens)), np.concatenate((before, answer.weights))


def chat(tokens: np.ndarray, weights: np.ndarray, id_: int = 0) -> Group:
    """A conversation, (L,) tokens and their weights, as an answer to its first token."""
    return Group(tokens[:1], (Answer(tokens[1:], weights[1:], id_),))


@dataclass(frozen=True)
class AnswerLayout:
    """How groups are laid out in a pack, and what their packs carry.

    Attributes:
        needs: columns of the objective, and of what fills columns for it.
        head: a scalar head is read at the last row of each answer and needs no labels.
        share_prefix: the prompt is computed once for all its answers.
    """

    needs: Set[Column]
    head: Head
    share_prefix: bool

    @property
    def labels_prompts(self) -> bool:
        """Whether the prompt of a chosen answer is learned too."""
        return Column.IN_ANSWER in self.needs

    def rows(self, prompt_length: np.ndarray, n_answers: np.ndarray, answer_tokens: np.ndarray) -> np.ndarray:
        """Rows of each group: its prompt's length, its answers, the tokens of all of them; int64."""
        if self.share_prefix:
            # Later answers repeat the prompt's last token.
            return prompt_length + answer_tokens + n_answers - 1
        return prompt_length * n_answers + answer_tokens


CHATS = AnswerLayout(frozenset(), Head.LM, share_prefix=True)


def mismatch(groups: Sequence[Group], tokens_per_pack: int, layout: AnswerLayout) -> list[Group]:
    """The prompts of a step, each followed by as many answers of the prompt before it (the last before the first).

    All answers to one prompt count as that prompt's, whether they share a group or not. Prompts stand in the order
    of a digest of their tokens, answers in that of their ids: so the same answers are mismatched alike in any
    packing, and what is neighbours in a file is not so here. An answer keeps the id of the one whose place it
    takes. What does not fit a pack is cut.

    Returns:
        No group where the step has one prompt only: there is no other's answer.
    """
    by_prompt = _one_group_a_prompt(groups)
    if len(by_prompt) < 2:
        return []
    made = []
    for group, previous in zip(by_prompt, [*by_prompt[-1:], *by_prompt[:-1]]):
        n_others = len(previous.answers)
        answers = [
            replace(previous.answers[k % n_others], id=answer.id) for k, answer in enumerate(group.answers)
        ]
        whole = Group(group.prompt, tuple(answers))
        if rows_of(whole, layout) <= tokens_per_pack:
            made.append(whole)
            continue
        room = tokens_per_pack - len(group.prompt)
        made += [
            Group(group.prompt, (replace(a, tokens=a.tokens[:room], weights=a.weights[:room]),))
            for a in answers
        ]
    return made


def _one_group_a_prompt(groups: Sequence[Group]) -> list[Group]:
    """The groups with all answers to a prompt in one, in an order that only prompts and ids decide."""
    found: dict[bytes, list[Group]] = {}
    for group in groups:
        digest = hashlib.blake2b(group.prompt.astype("<i8").tobytes(), digest_size=16).digest()
        found.setdefault(digest, []).append(group)
    return [
        Group(same[0].prompt, tuple(sorted((a for group in same for a in group.answers), key=lambda a: a.id)))
        for _, same in sorted(found.items())
    ]


def rows_of(group: Group, layout: AnswerLayout) -> int:
    """Rows that a group takes in a pack."""
    n_tokens = sum(len(answer.tokens) for answer in group.answers)
    return int(layout.rows(np.array(len(group.prompt)), np.array(len(group.answers)), np.array(n_tokens)))
