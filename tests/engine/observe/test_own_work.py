"""Which rank holds the others up, from what was measured of each."""

from __future__ import annotations

import pytest

from paralign.engine.observe.own_work import SLOW, _slowest


@pytest.mark.parametrize(
    ("times", "rank", "ratio"),
    [
        ([1.0], 0, 1.0),
        ([1.0, 2.0], 1, 2.0),  # of two ranks one can be slow
        ([1.0, 1.1, 0.9, 3.0], 3, 3.0),
        ([1.0, 1.2, 1.1, 1.0], 1, 1.2),
        ([0.0, 0.0], 0, 1.0),  # nothing was measured
        ([2.0] * 63 + [7.0], 63, 3.5),
    ],
)
def test_the_slowest_against_the_median(times: list[float], rank: int, ratio: float) -> None:
    slowest, found, lost = _slowest([(time, 10) for time in times])
    assert (slowest, found) == (rank, pytest.approx(ratio))
    assert lost >= 0
    assert (found > SLOW) == (ratio > SLOW)
