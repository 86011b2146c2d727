"""Training with every fused operation on (their references, where there is no GPU) equals transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paralign.engine.kernels.parts import fused_parts

from . import certificate
from .certificate import Case, Row, certify
from .pool import RankPool
from .reference import make_reference
from .test_certificate import BOUNDS, LAYOUTS, PLANS, SAMPLES


def certify_fused(rank: int, world_size: int, case: Case) -> Row:
    usual, certificate.choose_parts = certificate.choose_parts, fused_parts
    try:
        return certify(rank, world_size, case)
    finally:
        certificate.choose_parts = usual


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("1", {}),
        ("1", {"kernels": "reference"}),  # Megatron's own accumulation of weight gradients
        ("TP2×PP2×DP2+SP, VPP2, overlap, recompute 2", {}),
    ],
)
def test_fused_operations_equal_transformers(
    layout: str,
    model: dict,
    ranks: RankPool,
    tmp_path: Path,
    certificate_table: list,
) -> None:
    world_size, keys, more = LAYOUTS[layout]
    plan, reference = PLANS["8 packs of 96, in order"], tmp_path / "llama.pt"
    torch.save(make_reference("llama", SAMPLES), reference)
    case = Case(world_size, keys, {**more, **model}, reference, SAMPLES, plan)
    row = ranks.run(world_size, certify_fused, case)[0]
    certificate_table.append((f"{layout} | llama | fused operations {model or ''}", row))
    for figure in ("loss", "gradient", "grad_norm", "loss_after"):
        assert getattr(row, figure) <= getattr(BOUNDS, figure), f"{figure}: {row}"
