"""The layout certificate: every layout gives the numbers of an unpacked, single-process transformers run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from .certificate import Case, Plan, Row, certify
from .pool import RankPool
from .reference import Sample, make_reference, make_samples

BOUNDS = Row(loss=1e-6, gradient=1e-5, worst_gradient="", grad_norm=1e-5, loss_after=1e-5)

SAMPLES = make_samples()

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
    return world_size, degrees | keys, model


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
FAMILIES = ("llama", "qwen2")
FULL = list(itertools.product(LAYOUTS, FAMILIES, PLANS))


def _pairwise() -> list[tuple[str, str, str]]:
    """Every layout with each family and with each plan at least once, in half of the rows."""
    plans = list(PLANS)
    return [
        (layout, FAMILIES[(i + k) % 2], plan)
        for i, layout in enumerate(LAYOUTS)
        for k, plan in enumerate(plans)
    ]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("references")
    paths = {}
    for family in FAMILIES:
        paths[family] = folder / f"{family}.pt"
        torch.save(make_reference(family, SAMPLES), paths[family])
    return paths


def check(
    ranks: RankPool, layout: Layout, reference: Path, plan: Plan, samples: list[Sample] = SAMPLES
) -> Row:
    world_size, keys, model = layout
    row = ranks.run(world_size, certify, Case(world_size, keys, model, reference, samples, plan))[0]
    assert row.loss <= BOUNDS.loss, row
    assert row.gradient <= BOUNDS.gradient, row
    assert row.grad_norm <= BOUNDS.grad_norm, row
    assert row.loss_after <= BOUNDS.loss_after, row
    return row


@pytest.mark.parametrize(("layout", "family", "plan"), _pairwise())
def test_layout_matches_transformers(
    layout: str, family: str, plan: str, ranks: RankPool, references: dict[str, Path], record_property: Any
) -> None:
    row = check(ranks, LAYOUTS[layout], references[family], PLANS[plan])
    print(row)
