"""Packs of prompts with their answers: rows, keys, labels and columns, and mismatched answers."""

from __future__ import annotations

import numpy as np
import torch

from paralign.engine.batch import Column, Head
from paralign.engine.columns.fillers import put_reference
from paralign.engine.data.answers import Answer, AnswerLayout, Group, mismatch, rows_of
from paralign.engine.data.pack import pack_groups

CPU = torch.device("cpu")
PAIRS = frozenset({Column.PAIR})


def _answer(tokens: list[int], id_: int = 0, learned: list[int] | None = None) -> Answer:
    return Answer(np.array(tokens), np.array(learned or [1] * len(tokens), dtype=np.float32), id_)


GROUP = Group(np.array([1, 2, 3]), (_answer([4, 5], 0), _answer([6, 7, 8], 1, learned=[1, 1, 0])))
SHARED = AnswerLayout(PAIRS, Head.LM, share_prefix=True)
UNSHARED = AnswerLayout(PAIRS, Head.LM, share_prefix=False)


def test_a_shared_prompt_is_there_once_and_each_row_has_one_label() -> None:
    pack = pack_groups([GROUP], 12, CPU, SHARED)
    assert pack.tokens_T.tolist() == [1, 2, 3, 4, 5, 3, 6, 7, 8, 0, 0, 0]
    assert pack.labels_T.tolist() == [-100, -100, 4, 5, -100, 6, 7, -100, -100, -100, -100, -100]
    assert pack.segments.positions_T.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2]
    assert pack.segments.cu_seqlens_q.tolist() == [0, 5, 9, 12]
    assert pack.segments.cu_seqlens_kv.tolist() == [0, 5, 11, 14]
    assert pack.segments.kv_index is not None
    assert pack.segments.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10, 11]
    assert pack.segments.shared == ((0, 5, 2),)
    assert (pack.segments.max_seqlen_q, pack.segments.max_seqlen_kv) == (5, 6)
    assert pack.columns[Column.PAIR].tolist() == [[0, 1]]
    assert pack.columns[Column.ANSWER].tolist() == [0, 1, -1]
    assert pack.columns[Column.ANSWERS].tolist() == [0, 1]
    assert rows_of(GROUP, SHARED) == 9


def test_unshared_repeats_the_prompt_and_learns_the_same() -> None:
    pack = pack_groups([GROUP], 12, CPU, UNSHARED)
    assert pack.tokens_T.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 0]
    assert pack.segments.kv_index is None
    labels = pack.labels_T[pack.loss_rows].tolist()
    assert labels == [4, 5, 6, 7]
    shared = pack_groups([GROUP], 12, CPU, SHARED)
    assert shared.labels_T[shared.loss_rows].tolist() == labels
    assert rows_of(GROUP, UNSHARED) == 11


def test_a_scalar_head_is_read_at_the_end_of_each_answer() -> None:
    pack = pack_groups([GROUP], 12, CPU, AnswerLayout(PAIRS, Head.SCALAR, share_prefix=True))
    assert pack.loss_rows.tolist() == [4, 8]
    assert (pack.labels_T == -100).all()


def test_a_prompt_of_one_token_can_be_shared() -> None:
    group = Group(np.array([9]), (_answer([4]), _answer([6], 1)))
    pack = pack_groups([group], 4, CPU, SHARED)
    assert pack.tokens_T.tolist() == [9, 4, 9, 6]
    assert pack.segments.bounds == ((0, 2, 0, 2), (2, 4, 2, 4))


def test_reference_columns_follow_answer_ids() -> None:
    pack = pack_groups([GROUP], 12, CPU, SHARED)
    put_reference([pack], torch.tensor([-1.5, -2.5], dtype=torch.float64))
    assert pack.columns[Column.REF_LOGPROB].tolist() == [-1.5, -2.5, 0.0]
    assert pack.columns[Column.REF_LOGPROB].dtype == torch.float64


def test_a_prompt_can_be_learned_too() -> None:
    with_prompt = AnswerLayout(PAIRS | {Column.IN_ANSWER}, Head.LM, share_prefix=True)
    pack = pack_groups([GROUP], 12, CPU, with_prompt)
    assert pack.labels_T[pack.loss_rows].tolist() == [2, 3, 4, 5, 6, 7]


def _pairs_of(made: list[Group]) -> set[tuple[int, int]]:
    """(prompt, answer) of groups whose prompts and answers are one token each."""
    return {(int(group.prompt[0]), int(a.tokens[0])) for group in made for a in group.answers}


def test_an_answer_is_never_mismatched_with_its_own_prompt() -> None:
    """However answers lie in groups, and in whatever order those come: answers 10, 11 … are to prompt 1."""
    each = {1: [10, 11], 2: [20], 3: [30, 31, 32]}
    shared = [Group(np.array([p]), tuple(_answer([a], a) for a in answers)) for p, answers in each.items()]
    unshared = [Group(np.array([p]), (_answer([a], a),)) for p, answers in each.items() for a in answers]
    expected = mismatch(shared, 100, SHARED)
    for groups, layout in ((shared[::-1], SHARED), (unshared, UNSHARED), (unshared[::-1], UNSHARED)):
        made = mismatch(groups, 100, layout)
        assert _pairs_of(made) == _pairs_of(expected)
        assert all(prompt != answer // 10 for prompt, answer in _pairs_of(made))
        assert sorted(a.id for group in made for a in group.answers) == [10, 11, 20, 30, 31, 32]


def test_of_one_prompt_nothing_is_mismatched() -> None:
    groups = [Group(np.array([1]), (_answer([10]),)), Group(np.array([1], dtype=np.uint32), (_answer([11]),))]
    assert mismatch(groups, 100, UNSHARED) == []


def test_an_answer_is_mismatched_with_the_prompt_after_it() -> None:
    """Prompts stand in the order of their digests, 3, 1, 2; answers in that of their ids."""
    groups = [
        Group(np.array([1]), (_answer([10], 5),)),
        Group(np.array([2]), (_answer([20], 6), _answer([21], 7))),
        Group(np.array([3]), (_answer([30], 8), _answer([31], 9), _answer([32], 4))),
    ]
    made = mismatch(groups, 100, SHARED)
    assert [[a.tokens.tolist() for a in group.answers] for group in made] == [
        [[20], [21], [20]],
        [[32]],
        [[10], [10]],
    ]
    assert [[a.id for a in group.answers] for group in made] == [[4, 8, 9], [5], [6, 7]]


def test_a_mismatched_answer_is_cut_to_the_pack() -> None:
    groups = [
        Group(np.arange(7), (_answer([1, 2], 0), _answer([3], 1))),
        Group(np.arange(2), (_answer(list(range(8)), 2),)),
    ]
    made = mismatch(groups, 10, SHARED)
    assert [len(group.prompt) for group in made] == [7, 7, 2]
    assert all(rows_of(group, SHARED) <= 10 for group in made)
    assert [a.tokens.tolist() for group in made[:2] for a in group.answers] == [[0, 1, 2], [0, 1, 2]]
    assert sorted(a.id for group in made for a in group.answers) == [0, 1, 2]
