"""What is a spike, and what is not; the window goes on where a checkpoint left it."""

from __future__ import annotations

import math

import pytest

from paralign.engine.observe.spikes import SpikeConfig, Spikes

QUIET = [2.0 + 0.1 * math.sin(i) for i in range(8)]


def judged(
    loss: float, *, norm: float = 1.0, before: list[float] | None = None, threshold: float = 10
) -> str | None:
    seen = [(one, 1.0) for one in (QUIET if before is None else before)]
    spikes = Spikes(SpikeConfig(window=8, threshold=threshold), seen)
    return spikes.judge({"loss": loss, "grad_norm": norm})


def test_a_jump_is_a_spike_and_says_what_it_stands_out_from() -> None:
    text = judged(3035.0)
    assert text is not None
    assert text.startswith("the loss 3035 lies ")
    assert text.endswith("the median of 8 steps")
    assert "grad_norm" not in text
    assert "grad_norm 100 lies" in str(judged(2.0, norm=100.0))


@pytest.mark.parametrize("loss", [2.1, 2.9, 0.0, -50.0, math.nan])
def test_noise_and_what_falls_is_none(loss: float) -> None:
    assert judged(loss) is None


def test_nothing_is_judged_before_the_window_is_full() -> None:
    assert judged(3035.0, before=QUIET[:7]) is None


def test_almost_equal_values_do_not_make_a_spike_of_a_small_change() -> None:
    assert judged(2.1, before=[2.0] * 8) is None
    assert judged(2.3, before=[2.0] * 8) is not None


def test_outliers_in_the_window_do_not_hide_one() -> None:
    assert judged(3035.0, before=[*QUIET[:5], 900.0, 1000.0, 5000.0]) is not None


def test_the_window_goes_on_and_keeps_what_is_finite() -> None:
    spikes = Spikes(SpikeConfig(window=8), [(one, 1.0) for one in QUIET])
    spikes.accept({"loss": 5.0, "grad_norm": 2.0})
    spikes.accept({"loss": math.nan, "grad_norm": 2.0})
    assert spikes.window == (*((one, 1.0) for one in QUIET[1:]), (5.0, 2.0))
    again = Spikes(SpikeConfig(window=8), [list(pair) for pair in spikes.window])
    values = {"loss": 40.0, "grad_norm": 1.0}
    assert again.judge(values) == spikes.judge(values) is not None
