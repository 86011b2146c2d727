"""ALiBi in packs: slopes are the authors', and each segment is as if alone, shared keys included."""

import pytest
import torch

from paralign.models.attention import alibi_attention, alibi_slopes
from paralign.models.segments import Segments

from .baichuan2_reference import slopes_of


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 32, 40])
def test_slopes_are_those_of_the_authors(heads):
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(slopes_of(heads)))


def segments(lengths, kv_index=None, bounds=None, positions=None, shared=()):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return Segments(
        positions_T=torch.tensor(positions or [p for length in lengths for p in range(length)]),
        kv_index=kv_index,
        shared=shared,
        bounds=tuple(bounds or ((a, b, a, b) for a, b in zip(starts, ends))),
        alibi_slopes_H=alibi_slopes(4),
    )


def plain(q, k, v, scale):
    """Softmax over keys j ≤ i of q·k + slope · j, one sample."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores + torch.tensor(slopes_of(4))[:, None, None] * torch.arange(k.shape[0])
    scores = scores.masked_fill(torch.ones(q.shape[0], k.shape[0]).triu(1) > 0, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def test_each_segment_is_as_if_alone():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 4, 6)
    out = alibi_attention(q, k, v, segments([4, 5]), 0.5)
    alone = torch.cat([plain(*(x[rows] for x in (q, k, v)), 0.5) for rows in (slice(0, 4), slice(4, 9))])
    torch.testing.assert_close(out, alone)


def test_shared_keys_keep_their_distances():
    """Prompt of 3, two answers of 2: the second answer reads the prompt's first keys from the first segment."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 8, 4, 6)
    kv_index = torch.tensor([0, 1, 2, 3, 4, 0, 1, 5, 6, 7])
    pack = segments(
        *([5, 3], kv_index),
        bounds=[(0, 5, 0, 5), (5, 8, 5, 10)],
        positions=[0, 1, 2, 3, 4, 2, 3, 4],
        shared=((0, 5, 2),),
    )
    out = alibi_attention(q, k[kv_index], v[kv_index], pack, 0.5)
    second = torch.tensor([0, 1, 5, 6, 7])
    torch.testing.assert_close(out[5:], plain(q[second], k[second], v[second], 0.5)[2:])
