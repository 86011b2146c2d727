"""Segments that do not cover their pack are refused before a kernel reads past them."""

from __future__ import annotations

import pytest
import torch

from paralign.models.segments import Segments


@pytest.mark.parametrize(
    ("bounds", "kv_index", "found"),
    [
        (((0, 3, 0, 3), (3, 5, 3, 5)), None, "row 5 and key 5, and the pack has 6 rows and 6 keys"),
        (((0, 3, 0, 3), (3, 7, 3, 7)), None, "row 7 and key 7, and the pack has 6 rows and 6 keys"),
        (
            ((0, 3, 0, 3), (3, 6, 3, 8)),
            torch.arange(7),
            "row 6 and key 8, and the pack has 6 rows and 7 keys",
        ),
    ],
)
def test_cu_seqlens_that_do_not_end_where_the_pack_does(bounds, kv_index, found) -> None:
    with pytest.raises(
        ValueError, match=f"segments: the last one ends at {found}; segments must cover a pack"
    ):
        Segments(positions_T=torch.arange(6), bounds=bounds, kv_index=kv_index)


def test_segments_that_end_there_are_taken_if_every_key_has_a_row_of_its_own_or_is_shared() -> None:
    bounds, kv_index = ((0, 3, 0, 3), (3, 6, 3, 7)), torch.tensor([0, 1, 2, 0, 3, 4, 5])
    Segments(positions_T=torch.arange(6), bounds=bounds, kv_index=kv_index, shared=((0, 3, 1),))
    with pytest.raises(ValueError, match="segments: 0 keys are shared, and the pack has 6 rows and 7 keys"):
        Segments(positions_T=torch.arange(6), bounds=bounds, kv_index=kv_index)
