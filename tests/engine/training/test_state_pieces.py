"""A flat range of a parameter as rectangles of what it is saved as: all of it, once, and where it belongs."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from paralign.engine.training.state_pieces import pieces_of, row_ranges
from paralign.models.mcore import ShardedTensor, ShardedTensorFactory


def test_ranges_are_the_rest_of_a_row_whole_rows_and_a_beginning() -> None:
    assert row_ranges(3, 22, 5) == [(3, 5), (5, 20), (20, 22)]
    assert row_ranges(5, 10, 5) == [(5, 10)]
    assert row_ranges(6, 9, 5) == [(6, 9)]  # within a row
    assert row_ranges(8, 12, 5) == [(8, 10), (10, 12)]  # no row is whole
    assert row_ranges(4, 4, 5) == []


@pytest.mark.parametrize("shape", [(7, 5), (12,), (1, 9), (9, 1)])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
def test_the_ranges_of_all_ranks_make_up_the_parameter(shape: tuple[int, ...], n_ranks: int) -> None:
    """Gate and up of a fused projection lie apart in the tensor that is saved."""
    buffer = torch.randn(100)  # as Megatron has it: the parameter is a view that begins somewhere
    parameter = buffer[10 : 10 + torch.Size(shape).numel() * 2].view(2 * shape[0], *shape[1:])
    tp_rank, tp = 1, 2

    def build(key: str, data: torch.Tensor, replica_id: tuple[int, ...], _: object) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key, half, (0, place * tp + tp_rank, 2 * tp), replica_id=replica_id
            )
            for place, half in enumerate(data.chunk(2))
        ]

    whole = ShardedTensorFactory("fc1", parameter, build, torch.cat, (0, 0, 1))
    saved = torch.full((2 * tp * shape[0], *shape[1:]), torch.nan)
    n_elements = parameter.numel()
    cuts = [0, *sorted(random.Random(n_ranks).sample(range(n_elements), n_ranks - 1)), n_elements]
    for low, high in pairwise(cuts):
        state = parameter.flatten()[low:high].clone()
        pieces = list(pieces_of(whole, "optimizer.state.exp_avg.", state, low))
        assert len(pieces) <= 6
        for piece in pieces:
            assert piece.key == "optimizer.state.exp_avg.fc1"
            assert piece.replica_id == (0, 0, 0)  # each copy of the model writes its own
            assert piece.data.untyped_storage().data_ptr() == state.untyped_storage().data_ptr()
            place = tuple(
                slice(first, first + size) for first, size in zip(piece.global_offset, piece.data.shape)
            )
            assert saved[place].isnan().all()
            saved[place] = piece.data
    gate, up = parameter.chunk(2)
    expected = torch.full_like(saved, torch.nan)
    expected[shape[0] : 2 * shape[0]], expected[3 * shape[0] :] = gate, up
    torch.testing.assert_close(saved, expected, rtol=0, atol=0, equal_nan=True)
