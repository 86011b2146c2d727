"""The layout certificate: every layout gives the numbers of an unpacked, single-process transformers run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from paralign.engine.objectives import OBJECTIVES

from .certificate import Case, Plan, Row, certify
from .covering import (
    EVERY_ROW,
    MOST_RANKS,
    ROWS,
    Array,
    layout_of,
    name_of,
    pairs_of,
    rows_to_certify,
    world_size,
)
from .fused import certify_fused
from .pool import RankPool
from .reference import SAMPLE_SETS, SAMPLES

BOUNDS = Row(loss=1e-6, gradient=1e-5, worst_gradient="", grad_norm=1e-5, loss_after=1e-5)

Layout = tuple[int, Mapping[str, Any], Mapping[str, Any]]  # world size, keys of `layout:` and of `model:`


def _layout(
    world_size: int,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    model: Mapping[str, Any] = {},
    **keys: Any,
) -> Layout:
    degrees = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
    }
    return world_size, degrees | keys, model or {}


RECOMPUTE_2 = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

LAYOUTS: dict[str, Layout] = {
    "1": _layout(1),
    "TP2": _layout(2, tp=2),
    "TP2+SP": _layout(2, tp=2, sequence_parallel=True),
    "PP2": _layout(2, pp=2),
    "PP2×VPP2": _layout(2, pp=2, vpp=2),
    "PP4 uneven": _layout(4, pp=4, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=3),
    "DP2": _layout(2),
    "TP2×PP2×DP2+SP": _layout(8, tp=2, pp=2, sequence_parallel=True),
    "TP2×PP2×DP2+SP, VPP2, overlap, recompute 2": _layout(
        8, tp=2, pp=2, vpp=2, sequence_parallel=True, **OVERLAP, model=RECOMPUTE_2
    ),
}


def _pack(order: list[int], tokens_per_pack: int, n_packs: int) -> list[list[int]]:
    """First fit in a given order: any packing will do here, as long as two of them differ."""
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    for i in order:
        length = len(SAMPLES[i][0])
        fits = (p for p in packs if sum(len(SAMPLES[j][0]) for j in p) + length <= tokens_per_pack)
        next(fits).append(i)
    return packs


def _plans() -> dict[str, Plan]:
    longest_first = sorted(range(len(SAMPLES)), key=lambda i: -len(SAMPLES[i][0]))
    plans = {}
    for name, order, length, n in (
        ("8 packs of 96", longest_first, 96, 8),
        ("4 packs of 192", list(range(len(SAMPLES))), 192, 4),
    ):
        packs = _pack(order, length, n)
        for split, arranged in (("in order", packs), ("interleaved", packs[::2] + packs[1::2])):
            plans[f"{name}, {split}"] = Plan(name, length, tuple(tuple(pack) for pack in arranged))
    return plans


PLANS = _plans()
PACKINGS = {"many packs": "8 packs of 96", "few packs": "4 packs of 192"}  # of the first, the last is empty
SPLITS = ("in order", "interleaved")
FULL = list(itertools.product(LAYOUTS, ("llama", "qwen2"), PACKINGS, SPLITS))


def _check(
    case: Case,
    name: str,
    ranks: RankPool,
    table: list[tuple[str, Row]],
    *,
    task: Callable[[int, int, Case], Row] = certify,
) -> None:
    row = ranks.run(case.world_size, task, case)[0]
    table.append((name, row))
    for figure in ("loss", "gradient", "grad_norm", "loss_after"):
        assert getattr(row, figure) <= getattr(BOUNDS, figure), f"{name}: {figure}: {row}"


def test_any_two_settings_meet_in_few_rows() -> None:
    meet = {pair for row in ROWS for pair in pairs_of(row)}
    assert meet == {pair for row in EVERY_ROW for pair in pairs_of(row)}
    assert len(ROWS) <= 40
    assert sum(world_size(row) == MOST_RANKS for row in ROWS) <= 6
    assert {row["objective"] for row in ROWS} == set(OBJECTIVES)
    degrees = [(row["tensor"], row["pipeline"], row["data"], row["objective"] == "sft") for row in ROWS]
    for sft in (True, False):  # all three at once, which no pair asks for
        assert any(("TP2+SP", pipeline, "DP2", sft) in degrees for pipeline in ("PP2", "PP2×VPP2"))


@pytest.mark.parametrize("row", rows_to_certify(sft=True), ids=name_of)
def test_layout_equals_transformers(
    row: Array,
    ranks: RankPool,
    references: Callable[..., Path],
    certificate_table: list[tuple[str, Row]],
) -> None:
    world_size, keys, model = layout_of(row)
    plan = PLANS[f"{PACKINGS[row['packing']]}, {row['split']}"]
    case = Case(world_size, keys, model, references(row["family"]), SAMPLES, plan)
    _check(case, name_of(row), ranks, certificate_table, task=certify_fused if row["kernels"] else certify)


@pytest.mark.certificate
@pytest.mark.parametrize(("layout", "family", "packing", "split"), FULL)
def test_full_product(
    layout: str,
    family: str,
    packing: str,
    split: str,
    ranks: RankPool,
    references: Callable[..., Path],
    certificate_table: list[tuple[str, Row]],
) -> None:
    world_size, keys, model = LAYOUTS[layout]
    plan = PLANS[f"{PACKINGS[packing]}, {split}"]
    case = Case(world_size, keys, model, references(family), SAMPLES, plan)
    _check(case, f"{layout} | {family} | {packing}, {split}", ranks, certificate_table)


@pytest.mark.parametrize("layout", ["DP2", pytest.param("TP2×PP2×DP2+SP", marks=pytest.mark.certificate)])
def test_very_unequal_loss_tokens(
    layout: str,
    ranks: RankPool,
    references: Callable[..., Path],
    certificate_table: list[tuple[str, Row]],
) -> None:
    samples = SAMPLE_SETS["lopsided"]
    half = len(samples) // 2
    packs = [*_pack(list(range(half)), 256, 2), *_pack(list(range(half, len(samples))), 256, 2)]
    learned = [sum(sum(samples[i][1][1:]) for i in pack) for pack in packs]
    assert sum(learned[2:]) > 5 * sum(learned[:2])  # the two data-parallel ranks of this plan
    world_size, keys, model = LAYOUTS[layout]
    plan = Plan("lopsided", 256, tuple(map(tuple, packs)))
    case = Case(world_size, keys, model, references("llama", "lopsided"), samples, plan)
    _check(case, f"{layout} | llama | ranks with very unequal loss tokens", ranks, certificate_table)


@pytest.mark.parametrize("layout", ["DP2", pytest.param("TP2×PP2×DP2+SP", marks=pytest.mark.certificate)])
def test_weights_of_tokens(
    layout: str,
    ranks: RankPool,
    references: Callable[..., Path],
    certificate_table: list[tuple[str, Row]],
) -> None:
    """Fractions that add up to less than 1: the mean is over weights."""
    samples = SAMPLE_SETS["weighted"]
    assert 0 < sum(sum(weights[1:]) for _, weights in samples) < 1
    world_size, keys, model = LAYOUTS[layout]
    plan = PLANS["8 packs of 96, interleaved"]
    case = Case(world_size, keys, model, references("llama", "weighted"), samples, plan)
    _check(case, f"{layout} | llama | weights of tokens", ranks, certificate_table)


def test_head_alone_in_its_bucket(
    ranks: RankPool, references: Callable[..., Path], certificate_table: list[tuple[str, Row]]
) -> None:
    """A head that read its weight past its own forward would see stale weights, or hang, here."""
    world_size, keys, model = _layout(2, ddp_bucket_size=16000, **OVERLAP)  # the head has 251 × 64 parameters
    case = Case(world_size, keys, model, references("llama"), SAMPLES, PLANS["8 packs of 96, in order"])
    _check(case, "DP2, overlap, head alone in its bucket | llama | last pack empty", ranks, certificate_table)
