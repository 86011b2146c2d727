"""Prompts with their answers as packs: a prompt computed once, each answer a segment. Owns rows and columns.

T rows of a pack, S segments, N answers, P pairs, R rows with a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..batch import IGNORE, Column, Head, PackedBatch
from .answers import Answer, AnswerLayout, Group
from .pack import Piece, build_pack, send


def pack_answers(
    groups: Sequence[Group],
    tokens_per_pack: int,
    device: torch.device,
    layout: AnswerLayout,
    reference: np.ndarray | None = None,
) -> PackedBatch:
    """One pack of the given groups, in the given order.

    With a shared prompt a group is `[p + a | p_last + b | …]`: from the second answer on, the prompt's last
    token is repeated, so that every row has one label, and the keys are the prompt's and the segment's own.

    Args:
        reference: (answers in the data set,), log-probabilities under the reference model.

    Raises:
        ValueError: the groups are longer than the pack.
    """
    pieces: list[Piece] = []
    prompt_rows: list[int] = []  # of each piece: rows before those that predict the answer
    pairs: list[tuple[int, int]] = []
    for group in groups:
        first = len(pieces)
        n_prompt = len(group.prompt)
        if Column.PAIR in layout.needs:
            pairs.append((first, first + 1))
        for k, answer in enumerate(group.answers):
            shared = layout.share_prefix and k > 0
            before = group.prompt[-1:] if shared else group.prompt
            learned = np.full(len(before), layout.labels_prompts and k == 0, dtype=bool)
            ours = answer.learned
            if layout.labels_prompts and k == 0:
                ours = np.ones(len(answer.tokens), dtype=bool)
            pieces.append(
                Piece(
                    np.concatenate((before, answer.tokens)),
                    np.concatenate((learned, ours)),
                    (first, n_prompt - 1) if shared else None,
                )
            )
            prompt_rows.append(len(before) - 1)
    pack = build_pack(pieces, tokens_per_pack, device)
    answers = [answer for group in groups for answer in group.answers]
    n_segments = len(pack.segments.bounds)

    def per_segment(values: Sequence[float] | np.ndarray, tail: float, dtype: str) -> torch.Tensor:
        filled = np.full(n_segments, tail, dtype=dtype)
        filled[: len(values)] = values
        return send(filled, device)

    ids = [answer.id for answer in answers]
    columns = {
        Column.ANSWER: per_segment(ids, -1, "int64"),
        Column.ANSWERS: send(np.arange(len(answers)), device),
    }
    if Column.PAIR in layout.needs:
        columns[Column.PAIR] = send(np.array(pairs, dtype=np.int64).reshape(-1, 2), device)
    if Column.MARGIN in layout.needs:
        columns[Column.MARGIN] = send(np.array([g.margin for g in groups], dtype=np.float32), device)
    if Column.DESIRABLE in layout.needs:
        columns[Column.DESIRABLE] = per_segment([a.desirable for a in answers], False, "bool")
    if Column.SCORE in layout.needs:
        columns[Column.SCORE] = per_segment([a.score for a in answers], math.nan, "float32")
    if reference is not None:
        columns[Column.REF_LOGPROB] = per_segment(reference[ids], 0.0, "float64")
    if layout.labels_prompts:
        columns[Column.IN_ANSWER] = _rows_of_answers(pack, answers, prompt_rows, device)
    if layout.head is Head.SCALAR:
        ends = np.array([end for _, end, _, _ in pack.segments.bounds[: len(answers)]], dtype=np.int64)
        pack.labels_T.fill_(IGNORE)
        pack.loss_rows = send(ends - 1, device)
    pack.columns = columns
    return pack


def _rows_of_answers(
    pack: PackedBatch, answers: Sequence[Answer], prompt_rows: Sequence[int], device: torch.device
) -> torch.Tensor:
    """bool (R,): the loss rows whose label is a learned token of an answer."""
    inside_T = np.zeros(pack.tokens_T.shape[0], dtype=bool)
    for answer, (start, _, _, _), before in zip(answers, pack.segments.bounds, prompt_rows):
        rows = slice(start + before, start + before + len(answer.learned))
        inside_T[rows] = answer.learned
    return send(inside_T, device).index_select(0, pack.loss_rows)
