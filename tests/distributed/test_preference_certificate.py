"""The preference certificate: every objective, at every layout, shared or not, gives what TRL's loss gives.

TRL's losses get log-probabilities that transformers computed one answer at a time in one process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paralign.engine.batch import Head, Kind
from paralign.engine.data.answers import AnswerLayout, mismatch, rows_of
from paralign.engine.objectives import OBJECTIVES
from paralign.engine.objectives.cpo import CPOConfig
from paralign.engine.objectives.dpo import DPOConfig
from paralign.engine.objectives.kto import KTOConfig
from paralign.engine.objectives.orpo import ORPOConfig
from paralign.engine.objectives.reward import RewardConfig
from paralign.engine.objectives.simpo import SimPOConfig

from .covering import Array, layout_of, name_of, rows_to_certify
from .pool import RankPool
from .preference_certificate import (
    PreferenceCase,
    PreferencePlan,
    PreferenceRow,
    certify_preferences,
    first_fit,
    first_loss,
)
from .preference_reference import (
    Models,
    cpo_loss,
    dpo_loss,
    kto_loss,
    logprobs_of,
    make_labelled,
    make_pairs,
    make_preference_reference,
    orpo_loss,
    reward_loss,
    sequence,
    simpo_loss,
)

LOSS, GRADIENT = 1e-6, 1e-5

PAIRS, LABELLED = make_pairs(), make_labelled()
UNSHARED = AnswerLayout(frozenset(), Head.LM, share_prefix=False)


def _plans(groups: Any) -> dict[str, PreferencePlan]:
    """Two packings; in the first a pack is empty, and data-parallel ranks get very unequal numbers of groups."""
    rows = [rows_of(group, UNSHARED) for group in groups]
    longest_first = sorted(range(len(rows)), key=lambda i: -rows[i])
    few = first_fit([rows[i] for i in longest_first], 384, 4)
    many = first_fit(rows, 192, 12)
    return {
        "12 packs of 192": PreferencePlan(192, many),
        "4 packs of 384": PreferencePlan(384, tuple(tuple(longest_first[i] for i in pack) for pack in few)),
    }


PLANS = {"pairs": _plans(PAIRS), "labelled": _plans(LABELLED)}

CONFIGS: dict[str, Any] = {
    "reward": RewardConfig(name="reward", alpha=0.3, score_range=(-1, 1), center_rewards_coefficient=0.05),
    "dpo": DPOConfig(name="dpo", beta=0.1),
    "dpo ipo": DPOConfig(name="dpo", beta=0.1, loss_type="ipo"),
    "dpo hinge": DPOConfig(name="dpo", beta=0.1, loss_type="hinge"),
    "dpo robust": DPOConfig(name="dpo", beta=0.1, loss_type="robust", label_smoothing=0.2),
    "dpo + sft": DPOConfig(name="dpo", beta=0.1, sft_weight=0.5),
    "simpo": SimPOConfig(name="simpo", beta=2.0, gamma=0.5),
    "orpo": ORPOConfig(name="orpo", beta=0.2),
    "cpo": CPOConfig(name="cpo", beta=0.1, label_smoothing=0.1, cpo_alpha=0.7),
    "cpo ipo": CPOConfig(name="cpo", beta=0.1, loss_type="ipo", cpo_alpha=0.2),
    **{
        f"kto, {plan}": KTOConfig(name="kto", beta=0.1, desirable_weight=1.5, undesirable_weight=0.8)
        for plan in PLANS["labelled"]
    },
}


def _kto(plan: PreferencePlan, name: str) -> Callable[[Models], torch.Tensor]:
    order = [LABELLED[i] for pack in plan.packs for i in pack]
    others = mismatch(order, plan.tokens_per_pack, UNSHARED)

    def loss(models: Models) -> torch.Tensor:
        answers = {answer.id: (group.prompt, answer) for group in others for answer in group.answers}
        with torch.no_grad():
            ref_kl = [
                logprobs_of(models.reference_lm, *sequence(*answers[i])).sum() for i in range(len(answers))
            ]
        models.ref_logprobs[f"{name} mismatched"] = torch.stack(ref_kl).numpy()
        options = CONFIGS[name].model_dump(include={"beta", "desirable_weight", "undesirable_weight"})
        ref = models.ref_logprobs
        return kto_loss(models.lm, order, others, ref["labelled"], ref[f"{name} mismatched"], **options)

    return loss


def _dpo(*types: str, **options: Any) -> Callable[[Models], torch.Tensor]:
    return lambda m: dpo_loss(m.lm, m.pairs, m.ref_logprobs["pairs"], beta=0.1, types=types, **options)


REFERENCES: dict[str, Callable[[Models], torch.Tensor]] = {
    "reward": lambda m: reward_loss(m.scorer, m.pairs, alpha=0.3, centring=0.05),
    "dpo": _dpo("sigmoid"),
    "dpo ipo": _dpo("ipo"),
    "dpo hinge": _dpo("hinge"),
    "dpo robust": _dpo("robust", label_smoothing=0.2),
    "dpo + sft": _dpo("sigmoid", "sft", weights=(1.0, 0.5)),
    "simpo": lambda m: simpo_loss(m.lm, m.pairs, beta=2.0, gamma=0.5),
    "orpo": lambda m: orpo_loss(m.lm, m.pairs, beta=0.2),
    "cpo": lambda m: cpo_loss(m.lm, m.pairs, beta=0.1, loss_type="sigmoid", label_smoothing=0.1, alpha=0.7),
    "cpo ipo": lambda m: cpo_loss(m.lm, m.pairs, beta=0.1, loss_type="ipo", label_smoothing=0.0, alpha=0.2),
    **{f"kto, {name}": _kto(plan, f"kto, {name}") for name, plan in PLANS["labelled"].items()},
}

Layout = tuple[int, Mapping[str, Any]]


def _layout(world_size: int, tp: int = 1, pp: int = 1, vpp: int | None = None, **keys: Any) -> Layout:
    degrees = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
    }
    return world_size, degrees | keys


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, Layout] = {
    "1": _layout(1),
    "TP2+SP": _layout(2, tp=2, sequence_parallel=True),
    "PP2": _layout(2, pp=2),
    "PP2×VPP2": _layout(2, pp=2, vpp=2),
    "DP2, overlap": _layout(2, **OVERLAP),
    "TP2×PP2×DP2": _layout(8, tp=2, pp=2),
}
FULL = list(itertools.product(CONFIGS, (True, False), PLANS["pairs"]))


PACKINGS = {"many packs": "12 packs of 192", "few packs": "4 packs of 384"}


def _of_row(row: Array) -> list[tuple[str, bool, str]]:
    """Every case of an objective; of KTO's, whose baseline depends on the packs, the one of this packing."""
    plan = PACKINGS[row["packing"]]
    names = [name for name, config in CONFIGS.items() if config.name == row["objective"]]
    return [
        (name, row["prefix"] == "shared", plan)
        for name in names
        if row["objective"] != "kto" or name == f"kto, {plan}"
    ]


@pytest.fixture(scope="session")
def trl_references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of the reference of a family, computed once."""
    folder = tmp_path_factory.mktemp("preference")

    def make(family: str) -> Path:
        path = folder / f"{family}.pt"
        if not path.exists():
            pytest.importorskip("trl")
            torch.save(make_preference_reference(family, PAIRS, LABELLED, REFERENCES), path)
        return path

    return make


@dataclass(frozen=True)
class Worst:
    """The largest relative errors of many rows, for the table at the end."""

    loss: float
    gradient: float


def _cases(rows: list[tuple[str, bool, str]]) -> list[PreferenceCase]:
    made = []
    for name, share, plan in rows:
        kind = "labelled" if name.startswith("kto") else "pairs"
        groups = LABELLED if kind == "labelled" else PAIRS
        made.append(PreferenceCase(name, CONFIGS[name], share, groups, PLANS[kind][plan]))
    return made


def _check(
    title: str,
    layout: tuple[int, Mapping[str, Any], Mapping[str, Any]],
    rows: list[tuple[str, bool, str]],
    ranks: RankPool,
    reference: Path,
    table: list[tuple[str, Any]],
) -> list[PreferenceRow]:
    world_size, keys, model = layout
    results = ranks.run(world_size, certify_preferences, keys, model, reference, _cases(rows), timeout=240)[0]
    failed = [
        f"{name} | {'shared' if share else 'unshared'} | {plan}: {row}"
        for (name, share, plan), row in zip(rows, results)
        if not (row.loss <= LOSS and row.gradient <= GRADIENT)
    ]
    assert not failed, "\n".join(failed)
    baselines = [row.metrics["kl"] for (name, _, _), row in zip(rows, results) if name.startswith("kto")]
    worst = Worst(max(row.loss for row in results), max(row.gradient for row in results))
    table.append((f"{title}, worst of {len(rows)}", worst))
    assert all(
        baseline > 0.01 for baseline in baselines
    )  # at its floor of 0 it would be compared with nothing
    return results


@pytest.mark.parametrize("row", rows_to_certify(sft=False), ids=name_of)
def test_preferences_equal_trl(
    row: Array,
    ranks: RankPool,
    trl_references: Callable[[str], Path],
    certificate_table: list[tuple[str, Any]],
) -> None:
    reference = trl_references(row["family"])
    _check(name_of(row), layout_of(row), _of_row(row), ranks, reference, certificate_table)


@pytest.mark.certificate
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_product(
    layout: str,
    family: str,
    ranks: RankPool,
    trl_references: Callable[[str], Path],
    certificate_table: list[tuple[str, Any]],
) -> None:
    rows = [row for row in FULL if not row[0].startswith("kto") or row[0] == f"kto, {row[2]}"]
    title = f"{layout} | {family} | preferences"
    _check(title, (*LAYOUTS[layout], {}), rows, ranks, trl_references(family), certificate_table)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=() if layout in ("TP2+SP", "PP2×VPP2") else pytest.mark.certificate)
        for layout in LAYOUTS
    ],
)
def test_dpo_starts_at_ln_2(layout: str, ranks: RankPool, trl_references: Callable[[str], Path]) -> None:
    world_size, keys = LAYOUTS[layout]
    case = PreferenceCase("dpo", CONFIGS["dpo"], True, PAIRS, PLANS["pairs"]["4 packs of 384"])
    cached, online = ranks.run(world_size, first_loss, keys, trl_references("llama"), case)[0]
    assert abs(cached - math.log(2)) < 1e-6
    assert abs(online - math.log(2)) < 1e-6


def test_every_objective_over_answers_has_a_row() -> None:
    wanted = {name for name, objective in OBJECTIVES.items() if objective.reads is not Kind.CONVERSATIONS}
    assert {config.name for config in CONFIGS.values()} == wanted
    assert CONFIGS.keys() == REFERENCES.keys()


def test_ranks_get_unequal_numbers_of_pairs() -> None:
    """What the plans above are there for."""
    many = PLANS["pairs"]["12 packs of 192"].packs
    assert () in many
    halves = [sum(map(len, many[:6])), sum(map(len, many[6:]))]
    assert halves[0] > 1.5 * halves[1]
    assert np.ptp([len(a.tokens) for pair in PAIRS for a in pair.answers]) > 30
