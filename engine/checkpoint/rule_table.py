"""What a layout makes of a model's weights, as text: names, shapes, byte ranges. Reads config.json alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from paralign.models.weights import Rule

from ..parallel.layout import LayoutConfig, resolve, stage_rules
from .hf import arch_of


def rule_table(src: Path, *, tp: int, pp: int, dtype: torch.dtype | None = None) -> Iterator[str]:
    """A line for each native tensor, by pipeline stage, and one for each tensor-parallel share of it.

    A share is the bytes `first..end` of each Hugging Face tensor that it is made of, in order; a tensor that
    is cut by columns gives the bytes of every row.

    Args:
        src: a directory with config.json; weights need not be there.
        dtype: of the weights; None takes what config.json states.

    Raises:
        WeightsError, LayoutError: an unknown model, or degrees that do not divide it.
    """
    arch = arch_of(src)
    size = (getattr(torch, arch.dtype) if dtype is None else dtype).itemsize
    degrees = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    config = LayoutConfig.model_validate(degrees)
    layout = resolve(config, arch, world_size=tp * pp, global_batch_size=1, tokens_per_pack=tp)
    for stage, rules in enumerate(stage_rules(layout, arch)):
        for rule in rules:
            kind = type(rule).__name__
            yield f"stage {stage}  {rule.native}  {rule.native_shape} -> {rule.shard_shape(tp)} a rank  {kind}"
            if rule.split is None:
                yield f"    every rank: {rule.hf[0]}[0..{_bytes_of(rule, 0, size)}]"
                continue
            for tp_rank in range(tp):
                parts = [_part(rule, *piece, size) for piece in rule.pieces(tp_rank, tp)]
                yield f"    tp {tp_rank}: {' + '.join(part for part in parts if part) or 'padding'}"


def _part(rule: Rule, source: int, start: int, stop: int, size: int) -> str:
    name = rule.hf[source]
    if start == stop:
        return ""
    if rule.split == 1:
        return f"{name}[every row: {start * size}..{stop * size}]"
    row = _bytes_of(rule, source, size) // rule.hf_shapes[source][0]
    return f"{name}[{start * row}..{stop * row}]"


def _bytes_of(rule: Rule, source: int, size: int) -> int:
    return math.prod(rule.hf_shapes[source]) * size
