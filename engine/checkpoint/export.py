"""From the model in training to a Hugging Face directory. Owns the gathering; hf.py owns the files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paralign.models.arch import Arch
from paralign.models.weights import Rule

from ..layout import stage_rules
from ..mesh import Mesh
from ..whole_file import replace_directory
from .hf import Assets, StageWriter, copy_assets, finish_export, shard_plan


def export_hf(
    chunks: Sequence[Any],
    arch: Arch,
    mesh: Mesh,
    directory: Path,
    *,
    assets: Assets,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write the model as a directory that `from_pretrained` opens. Collective over all ranks.

    One rank of each pipeline stage gathers a tensor at a time and writes its stage's files; the directory
    appears when all of them are there, and replaces an older one of its name.

    Args:
        chunks: this rank's chunks, with current weights (`Optimizer.synchronize_weights`).
        assets: config and tokenizer that belong to the model.
    """
    stages = stage_rules(mesh.layout, arch)
    plan = shard_plan(stages, dtype=dtype, max_shard_bytes=max_shard_bytes)
    partial = directory.with_name(f"{directory.name}.part")
    if mesh.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    mesh.barrier()
    if mesh.dp_rank == 0:
        writer = StageWriter(partial, plan, mesh.pp_rank) if mesh.tp_rank == 0 else None
        rules = {rule.native: rule for rule in stages[mesh.pp_rank]}
        for chunk in chunks:
            for name, parameter in chunk.named_weights():
                if name in rules:  # not the copy of tied embeddings on the last stage
                    _gather_and_write(rules[name], parameter.detach(), mesh, writer)
        if writer is not None:
            writer.close()
    mesh.barrier()
    if mesh.is_main:
        copy_assets(assets, partial, dtype=str(dtype).removeprefix("torch."))
        finish_export(partial, plan)
        replace_directory(partial, directory)
    mesh.barrier()


def _gather_and_write(rule: Rule, shard: torch.Tensor, mesh: Mesh, writer: StageWriter | None) -> None:
    if rule.split is None:
        shards = [shard]
    else:
        shards = [torch.empty_like(shard) for _ in range(mesh.layout.tp)] if writer is not None else []
        dist.gather(shard.contiguous(), shards or None, group=mesh.tp_group, group_dst=0)
    if writer is not None:
        for name, tensor in rule.join(shards).items():
            writer.add(name, tensor)
