"""Prompts with their answers as packs: a prompt computed once, each answer a segment.

T rows of a pack, S segments of it (answers, then padding), N answers, P pairs, R rows with a loss, L rows of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from paralign.models.segments import Segments

from ..batch import IGNORE, Column, Head, PackedBatch
from .answers import CHATS, Answer, AnswerLayout, Group, chat

TAIL_ROWS = 128  # longest segment of padding: its attention work stays below that of any real pack


def pack_chats(
    samples: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]],
    tokens_per_pack: int,
    device: torch.device,
) -> PackedBatch:
    """One pack of conversations, each (L,) tokens and (L,) what they count in the loss; see `pack_groups`."""
    groups = [chat(np.asarray(tokens), np.asarray(weights, dtype=np.float32)) for tokens, weights in samples]
    return pack_groups(groups, tokens_per_pack, device)


@dataclass(frozen=True)
class Piece:
    """One segment of a pack.

    Attributes:
        tokens: (L,), of any integer type.
        weights: float32 (L,), what the token counts, to be predicted from the row before it; 0 is not learned.
        prefix: rows of an earlier segment whose keys come before this one's own: how many pieces back it lies, and
            how many of its first rows; positions go on after them. (0, 0) if the segment stands alone.
    """

    tokens: np.ndarray
    weights: np.ndarray
    prefix: tuple[int, int] = (0, 0)


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device, without waiting for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def pack_groups(
    groups: Sequence[Group],
    tokens_per_pack: int,
    device: torch.device,
    layout: AnswerLayout = CHATS,
) -> PackedBatch:
    """One pack of the given groups, in the given order, padded with short segments; no group is an empty pack.

    With a shared prompt a group is `[p + a | p_last + b | …]`: from the second answer on, the prompt's last
    token is repeated, so that every row has one label, and the keys are the prompt's and the segment's own.

    Raises:
        ValueError: the groups are longer than the pack.
    """
    pieces = [piece for group in groups for piece in _pieces(group, layout)]
    pack = _build(pieces, tokens_per_pack, device)
    pack.columns = _columns(pack, groups, pieces, layout, device)
    if layout.head is Head.SCALAR:
        ends = np.array([end for _, end, _, _ in pack.segments.bounds[: len(pieces)]], dtype=np.int64)
        pack.labels_T.fill_(IGNORE)
        pack.weights_T.zero_()
        pack.loss_rows = send(ends - 1, device)
    return pack


def _pieces(group: Group, layout: AnswerLayout) -> list[Piece]:
    """The segments of one group, one for each answer."""
    pieces = []
    for k, answer in enumerate(group.answers):
        shared = layout.share_prefix and k > 0
        before = group.prompt[-1:] if shared else group.prompt
        tokens = np.concatenate((before, answer.tokens))
        if layout.labels_prompts and k == 0:
            weights = np.ones(len(tokens), dtype=np.float32)
        else:
            weights = np.concatenate((np.zeros(len(before), dtype=np.float32), answer.weights))
        pieces.append(Piece(tokens, weights, (k, len(group.prompt) - 1) if shared else (0, 0)))
    return pieces


def _columns(
    pack: PackedBatch,
    groups: Sequence[Group],
    pieces: Sequence[Piece],
    layout: AnswerLayout,
    device: torch.device,
) -> dict[Column, torch.Tensor]:
    """What objectives read of a pack besides its tokens: ids and labels of answers, and which form pairs."""
    answers = [answer for group in groups for answer in group.answers]

    def per_segment(values: Sequence[float], tail: float, dtype: str) -> torch.Tensor:
        filled = np.full(len(pack.segments.bounds), tail, dtype=dtype)
        filled[: len(values)] = values
        return send(filled, device)

    columns = {
        Column.ANSWER: per_segment([answer.id for answer in answers], -1, "int64"),
        Column.ANSWERS: send(np.arange(len(answers)), device),
    }
    if Column.PAIR in layout.needs:
        firsts = np.cumsum([0, *(len(group.answers) for group in groups)])[:-1]
        columns[Column.PAIR] = send(np.stack((firsts, firsts + 1), axis=1), device)
    if Column.MARGIN in layout.needs:
        columns[Column.MARGIN] = send(np.array([g.margin for g in groups], dtype=np.float32), device)
    if Column.DESIRABLE in layout.needs:
        columns[Column.DESIRABLE] = per_segment([a.desirable for a in answers], False, "bool")
    if Column.SCORE in layout.needs:
        columns[Column.SCORE] = per_segment([a.score for a in answers], math.nan, "float32")
    if layout.labels_prompts:
        columns[Column.IN_ANSWER] = _rows_of_answers(pack, answers, pieces, device)
    return columns


def _rows_of_answers(
    pack: PackedBatch, answers: Sequence[Answer], pieces: Sequence[Piece], device: torch.device
) -> torch.Tensor:
    """bool (R,): the loss rows whose label is a learned token of an answer."""
    inside_T = np.zeros(pack.tokens_T.shape[0], dtype=bool)
    for answer, piece, (start, _, _, _) in zip(answers, pieces, pack.segments.bounds):
        first = start + len(piece.tokens) - len(answer.tokens) - 1  # its label is the answer's first token
        inside_T[first : first + len(answer.tokens)] = answer.weights > 0
    return send(inside_T, device).index_select(0, pack.loss_rows)


def _build(pieces: Sequence[Piece], tokens_per_pack: int, device: torch.device) -> PackedBatch:
    """One pack of the given pieces, in the given order, padded with short segments of token 0.

    Row i is to predict token i+1 of its own piece, if that is to be learned. No piece is an empty pack.

    Raises:
        ValueError: the pieces are longer than the pack.
    """
    lengths = [len(piece.tokens) for piece in pieces]
    n_real = sum(lengths)
    if n_real > tokens_per_pack:
        raise ValueError(f"segments of {n_real} tokens do not fit a pack of {tokens_per_pack}")
    tokens_T = np.zeros(tokens_per_pack, dtype=np.int64)
    counts_T = np.zeros(tokens_per_pack, dtype=np.float32)  # what each row's own token counts
    if pieces:
        np.concatenate([piece.tokens for piece in pieces], out=tokens_T[:n_real], casting="unsafe")
        np.concatenate([piece.weights for piece in pieces], out=counts_T[:n_real], casting="unsafe")

    n_tail = tokens_per_pack - n_real
    tail = [TAIL_ROWS] * (n_tail // TAIL_ROWS) + ([n_tail % TAIL_ROWS] if n_tail % TAIL_ROWS else [])
    prefixes = [piece.prefix for piece in pieces] + [(0, 0)] * len(tail)
    segments = _segments(np.array(lengths + tail), prefixes, device)
    counts_T[[start for start, *_ in segments.bounds]] = 0  # a segment's first token has nothing before it

    labels_T = np.full(tokens_per_pack, IGNORE, dtype=np.int64)
    weights_T = np.zeros(tokens_per_pack, dtype=np.float32)
    loss_rows = np.flatnonzero(counts_T) - 1
    labels_T[loss_rows] = tokens_T[loss_rows + 1]
    weights_T[loss_rows] = counts_T[loss_rows + 1]
    return PackedBatch(
        send(tokens_T, device),
        send(labels_T, device),
        send(loss_rows, device),
        send(weights_T, device),
        segments,
    )


def _segments(rows_S: np.ndarray, prefixes: Sequence[tuple[int, int]], device: torch.device) -> Segments:
    """Segments of so many rows, each behind the keys that its prefix names; see `Piece`."""
    shared_S = np.array([n_rows for _, n_rows in prefixes])
    cu_rows = np.concatenate(([0], np.cumsum(rows_S)))
    starts = cu_rows[:-1]
    cu_keys, kv_index, shared = cu_rows, None, []
    if shared_S.any():
        cu_keys = np.concatenate(([0], np.cumsum(rows_S + shared_S)))
        stretches = [
            np.arange(start, start + n_rows)
            for i, (back, n_shared) in enumerate(prefixes)
            for start, n_rows in ((starts[i - back], n_shared), (starts[i], rows_S[i]))
        ]
        kv_index = send(np.concatenate(stretches), device)
        shared = [
            (int(starts[i - back]), int(cu_keys[i]), n_shared)
            for i, (back, n_shared) in enumerate(prefixes)
            if n_shared
        ]
    cu_rows_S = send(cu_rows.astype(np.int32), device)
    return Segments(
        qkv_format="sbhd",
        cu_seqlens_q=cu_rows_S,
        cu_seqlens_kv=cu_rows_S if kv_index is None else send(cu_keys.astype(np.int32), device),
        max_seqlen_q=int(rows_S.max()),
        max_seqlen_kv=int((rows_S + shared_S).max()),
        positions_T=send(np.arange(int(rows_S.sum())) - np.repeat(starts - shared_S, rows_S), device),
        kv_index=kv_index,
        shared=tuple(shared),
        bounds=tuple(
            (*rows, *keys) for rows, keys in zip(pairwise(cu_rows.tolist()), pairwise(cu_keys.tolist()))
        ),
    )
