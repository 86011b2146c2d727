"""Losses and metrics on small packs worked out by hand; the certificate holds them against TRL at every layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from paralign.engine.batch import Column, Head, PackedBatch, Unit
from paralign.engine.columns.fillers import put_reference
from paralign.engine.data.answers import Answer, AnswerLayout, Group
from paralign.engine.data.pack import pack_groups
from paralign.engine.objectives import build_objective
from paralign.engine.objectives.answers import segments_of_rows
from paralign.engine.objectives.base import Objective
from paralign.engine.objectives.cpo import CPOConfig
from paralign.engine.objectives.dpo import DPOConfig
from paralign.engine.objectives.kto import KTOConfig
from paralign.engine.objectives.orpo import ORPOConfig
from paralign.engine.objectives.reward import RewardConfig
from paralign.engine.objectives.simpo import SimPOConfig
from paralign.models.head_read import HeadOutput, Quantity

CPU = torch.device("cpu")


def _answer(n: int, id_: int, **about: Any) -> Answer:
    return Answer(np.arange(n) + 7, np.ones(n, dtype=bool), id=id_, **about)


def _pack(objective: Objective, groups: list[Group], ref: list[float] | None = None) -> PackedBatch:
    layout = AnswerLayout(objective.needs, objective.head, share_prefix=True)
    pack = pack_groups(groups, 40, CPU, layout)
    if ref is not None:
        put_reference([pack], torch.tensor(ref, dtype=torch.float64))
    return pack


def _logprobs(pack: PackedBatch, per_answer: list[float]) -> HeadOutput:
    """What a head might give: each answer's log-probability spread evenly over its rows."""
    segment = segments_of_rows(pack)
    counts = torch.bincount(segment, minlength=len(per_answer))
    values = torch.tensor(per_answer)[segment] / counts[segment]
    return {Quantity.LOGPROB: values.requires_grad_()}


PAIR = [Group(np.arange(4), (_answer(2, 0), _answer(4, 1)))]
LOGPROBS, REF = [-3.0, -8.0], [-4.0, -6.0]  # log-ratios 1 and −2: Δ = 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"loss_type": "sigmoid"}, math.log1p(math.exp(-1.5))),
        ({"loss_type": "hinge"}, 0.0),
        ({"loss_type": "hinge", "beta": 0.1}, 0.7),
        ({"loss_type": "ipo"}, (1 / 2 + 2 / 4 - 1.0) ** 2),
        (
            {"loss_type": "robust", "label_smoothing": 0.25},
            (0.75 * math.log1p(math.exp(-1.5)) - 0.25 * math.log1p(math.exp(1.5))) / 0.5,
        ),
    ],
)
def test_dpo(options: dict[str, Any], expected: float) -> None:
    objective = build_objective(DPOConfig(name="dpo", **{"beta": 0.5, **options}))
    pack = _pack(objective, PAIR, REF)
    sums = objective.loss(_logprobs(pack, LOGPROBS), pack)
    assert sums.totals[Unit.PAIR].item() == pytest.approx(expected, abs=1e-6)
    beta = options.get("beta", 0.5)
    report = objective.report(sums.metrics.tolist())
    assert report == pytest.approx(
        {
            "rewards/chosen": beta,
            "rewards/rejected": -2 * beta,
            "rewards/accuracies": 1.0,
            "rewards/margins": 3 * beta,
            "logps/chosen": -3.0,
            "logps/rejected": -8.0,
        },
        abs=1e-5,
    )


def test_the_sft_term_of_dpo_is_counted_in_tokens() -> None:
    objective = build_objective(DPOConfig(name="dpo", beta=0.5, sft_weight=2.0))
    pack = _pack(objective, PAIR, REF)
    sums = objective.loss(_logprobs(pack, LOGPROBS), pack)
    assert sums.totals[Unit.TOKEN].item() == pytest.approx(
        6.0
    )  # two tokens, divided by their number in step.py
    assert objective.report(sums.metrics.tolist())["nll_loss"] == pytest.approx(1.5)


def test_simpo() -> None:
    objective = build_objective(SimPOConfig(name="simpo", beta=2.0, gamma=0.5))
    pack = _pack(objective, PAIR)
    total = objective.loss(_logprobs(pack, LOGPROBS), pack).totals[Unit.PAIR]
    assert total.item() == pytest.approx(math.log1p(math.exp(-(2 * (-1.5 + 2.0) - 0.5))))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, math.log1p(math.exp(-2.5))),
        ({"label_smoothing": 0.2}, 0.8 * math.log1p(math.exp(-2.5)) + 0.2 * math.log1p(math.exp(2.5))),
        ({"loss_type": "hinge"}, 0.0),
        ({"loss_type": "ipo"}, (-1.5 + 2.0 - 1.0) ** 2),
    ],
)
def test_cpo(options: dict[str, Any], expected: float) -> None:
    objective = build_objective(CPOConfig(name="cpo", beta=0.5, cpo_alpha=3.0, **options))
    pack = _pack(objective, PAIR)
    sums = objective.loss(_logprobs(pack, LOGPROBS), pack)
    assert sums.totals[Unit.PAIR].item() == pytest.approx(expected)
    assert sums.totals[Unit.TOKEN].item() == pytest.approx(3.0 * 3.0)  # two tokens: divided in step.py
    measured = objective.report(sums.metrics.tolist())
    assert measured["nll_loss"] == pytest.approx(1.5)
    assert measured["rewards/margins"] == pytest.approx(0.25 if options.get("loss_type") == "ipo" else 2.5)


def test_orpo_learns_the_prompt_but_weighs_the_answers() -> None:
    objective = build_objective(ORPOConfig(name="orpo", beta=0.3))
    pack = _pack(objective, PAIR)
    assert pack.loss_rows.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert pack.columns[Column.IN_ANSWER].tolist() == [False] * 3 + [True] * 6
    sums = objective.loss({Quantity.LOGPROB: torch.full((9,), -1.0)}, pack)
    assert sums.totals[Unit.TOKEN].item() == pytest.approx(5.0)
    assert sums.totals[Unit.PAIR].item() == pytest.approx(0.3 * math.log(2))  # equal odds


@pytest.mark.parametrize("x", [-1e-15, -1e-6, -0.6, -0.8, -50.0])
def test_odds_keep_their_digits_and_their_gradient(x: float) -> None:
    from paralign.engine.objectives.orpo import _log1mexp

    value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    result = _log1mexp(value)
    result.backward()
    assert result.item() == pytest.approx(math.log(-math.expm1(min(x, -1e-12))), rel=1e-9)
    assert value.grad is not None
    assert math.isfinite(value.grad.item())


def test_kto_weighs_good_and_bad_answers() -> None:
    objective = build_objective(KTOConfig(name="kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0))
    groups = [Group(np.arange(4), (_answer(2, 0, desirable=True), _answer(4, 1)))]
    pack = _pack(objective, groups, REF)
    pack.columns = {**pack.columns, Column.BASELINE: torch.tensor(0.4)}
    sums = objective.loss(_logprobs(pack, LOGPROBS), pack)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = 2 * (1 - sigmoid(0.5 * (1 - 0.4))) + 3 * (1 - sigmoid(0.5 * (0.4 + 2)))
    assert sums.totals[Unit.SAMPLE].item() == pytest.approx(expected, abs=1e-6)
    report = objective.report(sums.metrics.tolist())
    assert report["rewards/margins"] == pytest.approx(1.5, abs=1e-5)
    assert report["kl"] == pytest.approx(0.4)


def _reward_pack(scores: list[tuple[float, float]]) -> tuple[Objective, PackedBatch]:
    config = RewardConfig(name="reward", alpha=0.5, score_range=(0, 1), center_rewards_coefficient=0.1)
    objective = build_objective(config)
    groups = [
        Group(np.arange(4), (_answer(2, 2 * i, score=a), _answer(4, 2 * i + 1, score=b)), margin=0.25)
        for i, (a, b) in enumerate(scores)
    ]
    return objective, _pack(objective, groups)


def test_the_squared_error_is_weighted_pair_by_pair() -> None:
    objective, pack = _reward_pack([(0.5, -0.5), (math.nan, math.nan)])
    assert objective.head is Head.SCALAR
    assert len(pack.loss_rows) == 4  # one value for each answer
    rewards = torch.tensor([1.0, 0.0, -1.0, 1.0], requires_grad=True)
    sums = objective.loss({Quantity.VALUE: rewards}, pack)
    bt = [math.log1p(math.exp(-(1.0 - 0.25))), math.log1p(math.exp(-(-2.0 - 0.25)))]
    expected = sum(bt) + 0.5 * (0.25 + 0.25) + 0.1 * (1.0 + 0.0)
    assert sums.totals[Unit.PAIR].item() == pytest.approx(expected, abs=1e-6)
    sums.totals[Unit.PAIR].backward()
    assert rewards.grad is not None
    assert rewards.grad.isfinite().all()
    report = objective.report(sums.metrics.tolist())
    assert report["accuracy"] == 0.5
    assert report["score_mse"] == pytest.approx(0.25)
    confidence = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert report["calibration/0.7-0.8/confidence"] == pytest.approx(confidence[0], abs=1e-6)
    assert report["calibration/0.8-0.9/accuracy"] == 0.0
    assert "calibration/0.5-0.6/accuracy" not in report
    assert report["calibration_error"] == pytest.approx(
        (abs(1 - confidence[0]) + confidence[1]) / 2, abs=1e-6
    )


@pytest.mark.parametrize(
    "config",
    [
        DPOConfig(name="dpo", beta=0.1, sft_weight=1.0),
        SimPOConfig(name="simpo", beta=1.0, gamma=0.1),
        ORPOConfig(name="orpo", beta=0.1),
        CPOConfig(name="cpo", beta=0.1),
        KTOConfig(name="kto", beta=0.1),
        RewardConfig(name="reward", alpha=0.0),
    ],
)
def test_an_empty_pack_gives_zero_with_a_gradient(config: Any) -> None:
    """Overlapped gradient reduction waits for every parameter in every pack."""
    objective = build_objective(config)
    pack = _pack(objective, [], [0.0])
    pack.columns = {**pack.columns, Column.BASELINE: torch.tensor(0.0)}
    out = torch.zeros(0, requires_grad=True)
    sums = objective.loss(dict.fromkeys(objective.asks, out), pack)
    torch.stack(list(sums.totals.values())).sum().backward()
    assert all(total.item() == 0 for total in sums.totals.values())
    assert out.grad is not None
    assert not out.grad.any()
    assert sums.metrics.shape == (len(objective.metrics), 2)
    assert not sums.metrics.any()
