"""One rank of preflight: it meets the others, looks, and says what is bad."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import DistError

from paralign.models import known_warnings
from paralign.models.errors import ParalignError, TrainingError

from ...checkpoint.hf import arch_of
from ...files.refused import told
from ...parallel.layout import resolve
from ...processes.launch import RankEnv, rank_environment
from ...processes.variables import check_interface, set_before_cuda
from ..recipe import Recipe, load

_MINUTES = 3  # a rank that has not come by then does not come


def run(arguments: Sequence[str]) -> int:
    """Check the machines as this process's rank.

    Args:
        arguments: a recipe, and keys to set.

    Returns:
        The exit code: 0, or 2 if something is bad.
    """
    env = rank_environment()
    try:
        recipe = load(Path(arguments[0]), arguments[1:])
        return preflight(recipe, env)
    except Exception as raised:
        error = told(raised)
        if isinstance(error, DistError):
            error = TrainingError(
                f"rank {env.rank} on {socket.gethostname()} did not meet the other ranks at {env.master}, or lost "
                f"them: {str(error).splitlines()[0]}; look at nodes whose ranks say nothing, and at the network"
            )
        if not isinstance(error, ParalignError):
            raise
        if env.rank > 0:
            time.sleep(2)  # rank 0 most often finds the same; who leaves first ends the others
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # other ranks may sit in a collective that this one will never join


def preflight(recipe: Recipe, env: RankEnv) -> int:
    """Meet the other ranks, look at everything, and let rank 0 say what is bad."""
    layout = resolve(
        recipe.layout.model_copy(update={"distributed_timeout_minutes": _MINUTES}),
        arch_of(recipe.model.hf),
        world_size=env.world_size,
        global_batch_size=recipe.train.global_batch_size,
        tokens_per_pack=recipe.data.tokens_per_pack,
    )
    check_interface(env)
    set_before_cuda(env.rank, recipe.run_dir, tensor_parallel=layout.tp > 1)
    known_warnings.ignore()
    from rich.console import Console

    from ...parallel.mesh import open_mesh, open_world
    from .examine import bytes_of_a_save, examine, table

    began = time.monotonic()
    env.tell_torch()
    with (
        open_world(
            rank=env.rank, world_size=env.world_size, local_rank=env.local_rank, timeout_minutes=_MINUTES
        ),
        open_mesh(layout, local_rank=env.local_rank, seed=0) as mesh,
    ):
        room = bytes_of_a_save(arch_of(recipe.model.hf), trained_in_bf16=recipe.model.dtype == "bf16")
        ranks, findings = examine(mesh, recipe.run_dir, env.local_rank, room)
    if env.rank == 0:
        console = Console(highlight=False, soft_wrap=True)
        console.print(table(ranks))
        for finding in findings:
            console.print(f"bad: {finding}", markup=False)
        nodes, seconds = len({rank.host.name for rank in ranks}), time.monotonic() - began
        console.print(
            f"{nodes} nodes, {len(ranks)} ranks, {seconds:.0f} s: "
            + (f"{len(findings)} findings" if findings else "nothing bad found")
        )
    return 2 if findings else 0
