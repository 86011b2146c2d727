"""What Megatron's gradient buckets depend on: states that keep them go on where all of it is the same.

A state of `checkpoint.layout: same` has the optimizer as it lies in the buckets. Loaded into other buckets, one
parameter would get another one's moments; so what makes them is saved with it, and compared before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paralign.models.errors import CheckpointError

from .model import Model

_KEYS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "overlap_grad_reduce",
    "overlap_param_gather",
)
_CONTENT, _RANKS = "digest", "ranks"


def buckets_of(model: Model) -> dict[str, Any]:
    """The settings that buckets depend on, their content as a digest, and the number of ranks. Collective."""
    mesh, names = model.mesh, {parameter: name for name, parameter in model.named_weights()}
    content = [
        [
            str(buffer.param_dtype),
            bucket.numel_unpadded,
            [names[parameter] for parameter in bucket.params_list],
        ]
        for chunk in model.chunks
        for buffer in chunk.buffers
        for bucket in buffer.buckets
    ]
    of_ranks = set(mesh.gather(json.dumps([mesh.tp.rank, mesh.pp.rank, content])))  # copies say the same
    return {
        **{key: getattr(mesh.layout.config, key) for key in _KEYS},
        "ddp_bucket_size": model.chunks[0].ddp_config.bucket_size,
        "dtype": str(model.config.params_dtype).removeprefix("torch."),
        _CONTENT: hashlib.sha256("".join(sorted(of_ranks)).encode()).hexdigest(),
        _RANKS: mesh.world_size,
    }


def refuse_other_buckets(
    directory: Path, recipe: str, saved: Mapping[str, Any], present: Mapping[str, Any]
) -> None:
    """Raises CheckpointError where a state was saved from other buckets than those of this run.

    Args:
        recipe: name of the recipe in the checkpoint's directory.
    """
    if saved.get(_CONTENT) == present[_CONTENT]:
        return
    differing = [
        f"{key} {saved.get(key)} there and {value} here"
        for key, value in present.items()
        if key not in (_CONTENT, _RANKS) and saved.get(key) != value
    ] or ["other parameters in a bucket there than here, by another version of a library"]
    here = shlex.quote(f"run_dir={directory.absolute().parent.parent}")  # a copy's recipe names another
    command = f"paralign train {shlex.quote(str(directory / recipe))} {here} checkpoint.resume=auto --resave"
    raise CheckpointError(
        f"{directory}: was saved with checkpoint.layout: same, and goes on at that layout only: "
        f"{', '.join(differing)}; `{command} --nproc {saved.get(_RANKS)}` writes it again so that any layout loads "
        "it (over several machines `python -m paralign.engine.run` for `paralign train`, without --nproc); then "
        "start this run again"
    )
