"""From the model in training to a Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from paralign.models.errors import TrainingError

from ..checkpoint.hf import Assets, StageWriter, copy_assets, finish_export, shard_plan
from ..files.refused import refusals_told
from ..files.whole_file import replace_directory
from ..parallel.layout import stage_rules
from .model import Model
from .soundness import not_finite, told


def export_hf(
    model: Model,
    directory: Path,
    *,
    assets: Assets,
    dtype: torch.dtype,
    max_shard_bytes: int,
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Write the model as a directory that `from_pretrained` opens. Collective over all ranks.

    One rank of each pipeline stage writes its stage's files; the directory appears when all of them are there, and
    replaces an older one of its name.

    Args:
        assets: config and tokenizer that belong to the model.
        moved: called at each bucket of tensors, for whoever watches for stalls.

    Raises:
        TrainingError: a weight is not finite in `dtype`; it cannot be written, as on a full disk. An older directory
            stays.
    """
    mesh = model.mesh
    if found := not_finite(model, dtype):
        raise TrainingError(
            f"{directory}: not written, since weights are not finite in {str(dtype).removeprefix('torch.')}: "
            f"{told(found)}; convert the newest checkpoint that is sound, or, where float16 is too narrow, set "
            "checkpoint.export_dtype: bf16 and start the run again"
        )
    plan = shard_plan(stage_rules(mesh.layout, model.arch), dtype=dtype, max_shard_bytes=max_shard_bytes)
    partial = directory.with_name(f"{directory.name}.part")
    with refusals_told(partial):
        if mesh.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        mesh.barrier()
        writer = StageWriter(partial, plan, mesh.pp.rank) if mesh.dp.rank == mesh.tp.rank == 0 else None
        for bucket in model.tensors():
            moved()
            for name, tensor in bucket.items():
                assert writer is not None
                writer.add(name, tensor)
        if writer is not None:
            writer.close()
        mesh.barrier()
        moved()
        if mesh.is_main:
            copy_assets(assets, partial, dtype=str(dtype).removeprefix("torch."))
            finish_export(partial, plan)
            replace_directory(partial, directory)
        mesh.barrier()
