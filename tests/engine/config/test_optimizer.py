"""The learning rate at its corners, and the rules of the optimizer's section."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paralign.engine.config.optimizer import OptimizerConfig, learning_rate, warmup_steps


def config(**keys: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate(
        {"lr": 1.0, "lr_decay_style": "cosine", "weight_decay": 0.1, **keys}
    )


def test_warm_up_begins_at_a_step_of_it_and_ends_at_the_peak() -> None:
    rates = [learning_rate(config(lr_warmup_steps=4), step, 100) for step in range(6)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[5] < 1.0


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert learning_rate(config(), 0, 100) == 1.0


def test_a_fraction_is_rounded_up_to_whole_steps() -> None:
    assert learning_rate(config(lr_warmup_fraction=0.01), 0, 150) == 0.5


@pytest.mark.parametrize(("fraction", "total", "steps"), [(0.07, 100, 7), (0.1, 30, 3), (1e-05, 100_000, 1)])
def test_a_fraction_that_is_whole_steps_is_not_rounded_up(fraction: float, total: int, steps: int) -> None:
    assert warmup_steps(config(lr_warmup_fraction=fraction), total) == steps


@pytest.mark.parametrize(("style", "half"), [("cosine", 0.6), ("linear", 0.6), ("constant", 1.0)])
def test_decay_is_halfway_between_at_half_time(style: str, half: float) -> None:
    decaying = config(lr_decay_style=style, min_lr=0.2, lr_warmup_steps=20)
    assert learning_rate(decaying, 60, 100) == pytest.approx(half)


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_the_last_step_still_learns_and_the_minimum_holds_from_then_on(style: str) -> None:
    decaying = config(lr_decay_style=style, lr_warmup_steps=2)
    assert learning_rate(decaying, 9, 10) > 0
    assert [learning_rate(decaying, step, 10) for step in (10, 11, 1000)] == [0.0, 0.0, 0.0]


@given(st.integers(1, 200), st.integers(0, 300), st.sampled_from(["cosine", "linear", "constant"]), st.data())
def test_it_rises_then_falls_within_its_bounds(
    total: int, warmup: int, style: str, data: st.DataObject
) -> None:
    schedule = config(lr_decay_style=style, lr_warmup_steps=warmup, min_lr=data.draw(st.floats(0, 1)))
    rates = [learning_rate(schedule, step, total) for step in range(total)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < max(rates) <= 1.0
    assert min(rates[warmup:], default=1.0) >= schedule.min_lr - 1e-12


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr_warmup_steps": 1, "lr_warmup_fraction": 0.1}, "both given"),
        ({"min_lr": 2.0}, "min_lr 2 is above lr 1"),
        ({"lr": float("inf")}, "finite"),
        ({"lr": 0.0}, "greater than 0"),
    ],
)
def test_contradictions_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**keys)
