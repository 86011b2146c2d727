"""From segments as arrays to the tensors of one pack. Owns rows, keys and padding, not what a segment means.

T rows of a pack, S segments of it (pieces, then the tail), L rows of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from paralign.models.segments import Segments

from ..batch import IGNORE, PackedBatch

TAIL_ROWS = 128  # longest segment of padding: its attention work stays below that of any real pack


@dataclass(frozen=True)
class Piece:
    """One segment of a pack.

    Attributes:
        tokens: (L,), of any integer type.
        learned: (L,), 1 where the token is to be predicted from the row before it.
        prefix: rows of an earlier segment whose keys come before this one's own: the index of that piece and
            how many of its first rows; positions go on after them. None if the segment stands alone.
    """

    tokens: np.ndarray
    learned: np.ndarray
    prefix: tuple[int, int] | None = None


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device, without waiting for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def build_pack(pieces: Sequence[Piece], tokens_per_pack: int, device: torch.device) -> PackedBatch:
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
    learned_T = np.zeros(tokens_per_pack, dtype=bool)
    if pieces:
        np.concatenate([piece.tokens for piece in pieces], out=tokens_T[:n_real], casting="unsafe")
        np.concatenate([piece.learned for piece in pieces], out=learned_T[:n_real], casting="unsafe")

    n_tail = tokens_per_pack - n_real
    tail = [TAIL_ROWS] * (n_tail // TAIL_ROWS) + ([n_tail % TAIL_ROWS] if n_tail % TAIL_ROWS else [])
    prefixes = [piece.prefix or (0, 0) for piece in pieces] + [(0, 0)] * len(tail)
    shared_S = np.array([n_rows for _, n_rows in prefixes])
    rows_S = np.array(lengths + tail)
    cu_rows = np.concatenate(([0], np.cumsum(rows_S)))
    starts = cu_rows[:-1]
    learned_T[starts] = False  # the first token of a segment has nothing before it

    labels_T = np.full(tokens_per_pack, IGNORE, dtype=np.int64)
    loss_rows = np.flatnonzero(learned_T) - 1
    labels_T[loss_rows] = tokens_T[loss_rows + 1]

    cu_keys, kv_index = cu_rows, None
    if shared_S.any():
        cu_keys = np.concatenate(([0], np.cumsum(rows_S + shared_S)))
        stretches = [
            np.arange(start, start + n_rows)
            for own, end, (owner, n_shared) in zip(starts, cu_rows[1:], prefixes)
            for start, n_rows in ((starts[owner], n_shared), (own, end - own))
        ]
        kv_index = send(np.concatenate(stretches), device)
    cu_rows_S = send(cu_rows.astype(np.int32), device)
    segments = Segments(
        qkv_format="sbhd",
        cu_seqlens_q=cu_rows_S,
        cu_seqlens_kv=cu_rows_S if kv_index is None else send(cu_keys.astype(np.int32), device),
        max_seqlen_q=int(rows_S.max()),
        max_seqlen_kv=int((rows_S + shared_S).max()),
        positions_T=send(np.arange(tokens_per_pack) - np.repeat(starts - shared_S, rows_S), device),
        kv_index=kv_index,
        n_real=n_real,
        bounds=tuple(
            (*rows, *keys) for rows, keys in zip(pairwise(cu_rows.tolist()), pairwise(cu_keys.tolist()))
        ),
    )
    return PackedBatch(send(tokens_T, device), send(labels_T, device), send(loss_rows, device), segments)
