"""The layout certificate: every layout gives the numbers of an unpacked, single-process transformers run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
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
PACKINGS = ("8 packs of 96", "4 packs of 192")  # the last pack of the first is empty
SPLITS = ("in order", "interleaved")
FAMILIES = ("llama", "qwen2")
FULL = list(itertools.product(LAYOUTS, FAMILIES, PACKINGS, SPLITS))


def _pairwise() -> list[tuple[str, str, str, str]]:
    """Two complementary rows for each layout, so that any two settings of any two factors meet somewhere."""
    rows = []
    for i, layout in enumerate(LAYOUTS):
        packing, split = divmod(i % 4, 2)
        rows.append((layout, FAMILIES[0], PACKINGS[packing], SPLITS[split]))
        rows.append((layout, FAMILIES[1], PACKINGS[1 - packing], SPLITS[1 - split]))
    return rows


def _lopsided() -> list[Sample]:
    """The first half of the samples learns one token each, the second every token."""
    half = len(SAMPLES) // 2
    return [
        (tokens, [position == len(tokens) - 1 or i >= half for position in range(len(tokens))])
        for i, (tokens, _) in enumerate(SAMPLES)
    ]


def _weighted() -> list[Sample]:
    """Learned tokens count between 0.0005 and 0.0025 each."""
    return [
        (tokens, [0.0005 * (1 + (position + i) % 5) * learned for position, learned in enumerate(mask)])
        for i, (tokens, mask) in enumerate(SAMPLES)
    ]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Path of the reference of a family on a sample set; each is computed once."""
    folder = tmp_path_factory.mktemp("references")

    def make(family: str, samples: str = "plain") -> Path:
        path = folder / f"{family}-{samples}.pt"
        if not path.exists():
            sets = {"plain": SAMPLES, "lopsided": _lopsided(), "weighted": _weighted()}
            torch.save(make_reference(family, sets[samples]), path)
        return path

    return make


def _check(case: Case, name: str, ranks: RankPool, table: list[tuple[str, Row]]) -> None:
    row = ranks.run(case.world_size, certify, case)[0]
    table.append((name, row))
    for figure in ("loss", "gradient", "grad_norm", "loss_after"):
        assert getattr(row, figure) <= getattr(BOUNDS, figure), f"{name}: {figure}: {row}"


@pytest.mark.parametrize(
    ("layout", "family", "packing", "split"),
    [
        *_pairwise(),
        *(pytest.param(*row, marks=pytest.mark.certificate) for row in FULL if row not in _pairwise()),
    ],
)
def test_layout_equals_transformers(
    layout: str,
    family: str,
    packing: str,
    split: str,
    ranks: RankPool,
    references: Callable[..., Path],
    certificate_table: list[tuple[str, Row]],
) -> None:
    world_size, keys, model = LAYOUTS[layout]
    case = Case(world_size, keys, model, references(family), SAMPLES, PLANS[f"{packing}, {split}"])
    _check(case, f"{layout} | {family} | {packing}, {split}", ranks, certificate_table)


@pytest.mark.parametrize("layout", ["DP2", "TP2×PP2×DP2+SP"])
def test_very_unequal_loss_tokens(
    layout: str,
    ranks: RankPool,
    references: Callable[..., Path],
    certificate_table: list[tuple[str, Row]],
) -> None:
    samples = _lopsided()
    half = len(samples) // 2
    packs = [*_pack(list(range(half)), 256, 2), *_pack(list(range(half, len(samples))), 256, 2)]
    learned = [sum(sum(samples[i][1][1:]) for i in pack) for pack in packs]
    assert sum(learned[2:]) > 5 * sum(learned[:2])  # the two data-parallel ranks of this plan
    world_size, keys, model = LAYOUTS[layout]
    plan = Plan("lopsided", 256, tuple(map(tuple, packs)))
    case = Case(world_size, keys, model, references("llama", "lopsided"), samples, plan)
    _check(case, f"{layout} | llama | ranks with very unequal loss tokens", ranks, certificate_table)


def test_weights_of_tokens(
    ranks: RankPool, references: Callable[..., Path], certificate_table: list[tuple[str, Row]]
) -> None:
    """Fractions that add up to less than 1: the mean is over weights."""
    samples = _weighted()
    assert 0 < sum(sum(weights[1:]) for _, weights in samples) < 1
    world_size, keys, model = LAYOUTS["TP2×PP2×DP2+SP"]
    plan = PLANS["8 packs of 96, interleaved"]
    case = Case(world_size, keys, model, references("llama", "weighted"), samples, plan)
    _check(case, "TP2×PP2×DP2+SP | llama | weights of tokens", ranks, certificate_table)


def test_head_alone_in_its_bucket(
    ranks: RankPool, references: Callable[..., Path], certificate_table: list[tuple[str, Row]]
) -> None:
    """A head that read its weight past its own forward would see stale weights, or hang, here."""
    world_size, keys, model = _layout(2, ddp_bucket_size=16000, **OVERLAP)  # the head has 251 × 64 parameters
    case = Case(world_size, keys, model, references("llama"), SAMPLES, PLANS["8 packs of 96, in order"])
    _check(case, "DP2, overlap, head alone in its bucket | llama | last pack empty", ranks, certificate_table)
