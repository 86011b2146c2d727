"""Families beside the certificate's two, and a degree above the KV heads, train as their references do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .certificate import Case, Row, certify
from .pool import RankPool
from .reference import SAMPLES, tiny_model
from .test_certificate import BOUNDS, LAYOUTS, PLANS, _layout

WIDE = {
    "TP8+SP": _layout(8, tp=8, sequence_parallel=True),
    "TP4×PP2": _layout(8, tp=4, pp=2),
    "TP8": _layout(8, tp=8),
}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", "TP8"),  # 8 query heads in 4 groups: two ranks share a key head
        *(
            pytest.param(family, layout, marks=pytest.mark.certificate)
            for family in ("qwen3", "mistral", "baichuan2-7b", "baichuan2-13b")
            for layout in (*LAYOUTS, "TP4×PP2")
        ),
        *(pytest.param(family, "TP8+SP", marks=pytest.mark.certificate) for family in ("qwen2", "qwen3")),
    ],
)
def test_family_equals_its_reference(
    family: str,
    layout: str,
    ranks: RankPool,
    references: Callable[[str], Path],
    certificate_table: list[tuple[str, Row]],
) -> None:
    world_size, keys, model = (LAYOUTS | WIDE)[layout]
    case = Case(world_size, keys, model, references(family), SAMPLES, PLANS["4 packs of 192, interleaved"])
    row = ranks.run(world_size, certify, case)[0]
    certificate_table.append((f"{layout} | {family}", row))
    for figure in ("loss", "gradient", "grad_norm", "loss_after"):
        assert getattr(row, figure) <= getattr(BOUNDS, figure), f"{figure}: {row}"


def test_a_family_without_a_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="family 'mixtral' is unknown; known are llama, mistral"):
        tiny_model("mixtral")
