"""Segments: who attends to whom in a pack. attention.py computes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .mcore import PackedSeqParams


@dataclass
class Segments(PackedSeqParams):
    """T rows of a pack divided into S segments; a row attends causally inside its own segment.

    It travels as Megatron's `packed_seq_params`, with `qkv_format="sbhd"`: the pack is a sequence of
    length T at batch size 1, so that Megatron keeps its own packed RoPE out of the way (it wants as many
    keys as queries and syncs the host in every layer).

    Attributes:
        cu_seqlens_q: int32 (S+1,), first query row of each segment; ends at T.
        cu_seqlens_kv: int32 (S+1,), the same for keys; differs from `cu_seqlens_q` only if keys are shared.
        max_seqlen_q, max_seqlen_kv: longest segment, Python ints, so that no kernel asks the device.
        positions_T: int64 (T,), position of each row in its sample; RoPE reads these and nothing else.
        kv_index: int64 (cu_seqlens_kv[-1],), the row each key is read from; None if key i is row i.
        shared: the same of keys that are another segment's rows: (first row, first key, how many) of each stretch.
            Every other key is a row of its own segment.
        bounds: for each segment the Python ints (first row, end row, first key, end key), for kernels that
            loop over segments.
        rope: float32 (D/2,), rotary frequencies, from the decoder; None where the model has none.
        alibi_slopes_H: float32, slope of each of this rank's query heads where the model has ALiBi; from the
            decoder, in place of `rope`.

    Raises:
        ValueError: the segments do not end where rows and keys end; kernels would read past them. `shared` is not
            of as many keys as there are more than rows: gradients would go to wrong rows.
    """

    positions_T: Tensor = None  # type: ignore[assignment]  # the base class has defaults
    kv_index: Tensor | None = None
    shared: tuple[tuple[int, int, int], ...] = ()
    bounds: tuple[tuple[int, int, int, int], ...] = ()
    rope: Tensor | None = None
    alibi_slopes_H: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.bounds or self.positions_T is None:
            return
        n_rows = self.positions_T.numel()
        n_keys = n_rows if self.kv_index is None else self.kv_index.numel()
        if self.bounds[-1][1] != n_rows or self.bounds[-1][3] != n_keys:
            raise ValueError(
                f"segments: the last one ends at row {self.bounds[-1][1]} and key {self.bounds[-1][3]}, and the pack "
                f"has {n_rows} rows and {n_keys} keys; segments must cover a pack, its padding tail included"
            )
        n_shared = sum(n for _, _, n in self.shared)
        if n_shared != n_keys - n_rows:
            raise ValueError(
                f"segments: {n_shared} keys are shared, and the pack has {n_rows} rows and {n_keys} keys; name every "
                "stretch of another segment's rows in `shared`"
            )
