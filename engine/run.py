"""One rank of a run: recipe to parts to trainer. The table of contents of the engine.

torchrun --nproc_per_node 8 … -m paralign.engine.run RECIPE [key.sub=value …]
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralign.models.errors import CheckpointError, ParalignError

from .check import CheckReport, check
from .checkpoint import store
from .checkpoint.hf import Assets, HFReader, arch_of, parse_size
from .data.render import template_text
from .launch import RankEnv, rank_environment
from .layout import resolve
from .recipe import Recipe, dump, load

EXIT_STOPPED = 75  # EX_TEMPFAIL: the state is saved, start it again

if TYPE_CHECKING:
    from .mesh import Mesh
    from .trainer import Trainer


def main(arguments: Sequence[str]) -> int:
    """Train as this process's rank.

    Returns:
        The exit code: 0; 2 for an error that the user can mend; `EXIT_STOPPED` if a signal ended the run and it
        is to be started again.
    """
    env = rank_environment()
    world_store: list[Any] = []  # filled once the ranks have met
    try:
        recipe = load(Path(arguments[0]), arguments[1:])
        # Arithmetic first: a layout that cannot be must not wait for other ranks.
        resolve(
            recipe.layout,
            arch_of(recipe.model.hf),
            world_size=env.world_size,
            global_batch_size=recipe.train.global_batch_size,
            tokens_per_pack=recipe.data.tokens_per_pack,
        )
        whole = meet_and_train(recipe, env, world_store)
    except Exception as error:
        mendable = isinstance(error, ParalignError)
        if _first_to_fail(env, world_store):
            print(f"error: {error}" if mendable else traceback.format_exc(), file=sys.stderr, flush=True)
        # Without waiting: other ranks may sit in a collective that this one will never join.
        sys.stdout.flush()
        os._exit(2 if mendable else 1)
    return 0 if whole else EXIT_STOPPED


def meet_and_train(recipe: Recipe, env: RankEnv, world_store: list[Any]) -> bool:
    """Join the other ranks, check the recipe on all of them, train; see `train`."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="megatron")
    from .mesh import open_world

    host, port = env.master.rsplit(":", 1)
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port, RANK=str(env.rank), WORLD_SIZE=str(env.world_size))
    with open_world(
        rank=env.rank,
        world_size=env.world_size,
        local_rank=env.local_rank,
        timeout_minutes=recipe.layout.distributed_timeout_minutes,
    ) as opened:
        world_store.append(opened)
        with _rank_0_first(env, opened):
            report = check(recipe, env.world_size, progress=env.rank == 0)
        return train(report, local_rank=env.local_rank)


def train(report: CheckReport, *, local_rank: int) -> bool:
    """Train a checked recipe in an open world, from its newest checkpoint if it has one.

    Returns:
        Whether the run came to its end.
    """
    from .mesh import open_mesh

    recipe = report.recipe
    if recipe.model.deterministic:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with open_mesh(report.layout, local_rank=local_rank, seed=recipe.train.seed) as mesh:
        trainer = build_trainer(report, mesh)
        try:
            with trainer.health:
                return trainer.fit()
        finally:
            trainer.log.close()


def build_trainer(report: CheckReport, mesh: Mesh) -> Trainer:
    """Model, optimizer, loaders, checkpoints and log of one rank, with the state of the newest checkpoint."""
    from paralign.models.attention import choose_kernel

    from .build import (
        DTYPES,
        build_chunks,
        load_weights,
        random_weights,
        transformer_config,
        wrap_for_data_parallel,
    )
    from .checkpoint.export import export_hf
    from .checkpoint.native import NativeCheckpoints
    from .data.loader import PackLoader
    from .kernels.parts import choose_parts
    from .objectives import OBJECTIVES
    from .observe.health import Health
    from .observe.metrics import MetricsLog
    from .observe.throughput import Throughput, peak_flops
    from .optim import Optimizer
    from .trainer import Cadence, Trainer

    recipe, arch, layout = report.recipe, report.arch, report.layout
    dtype = DTYPES[recipe.model.dtype]
    config = transformer_config(arch, layout, recipe.model)
    chunks = build_chunks(config, arch, mesh, choose_parts())
    if recipe.model.init == "random":
        read = random_weights(arch, seed=recipe.train.seed, dtype=dtype, device=mesh.device)
    else:
        read = HFReader(recipe.model.hf).read
    load_weights(chunks, arch, mesh, read)
    wrapped = wrap_for_data_parallel(chunks, config, layout)
    optimizer = Optimizer(wrapped, recipe.optimizer, layout, dtype)

    loaders = {
        name: PackLoader(
            cache,
            global_batch_size=recipe.train.global_batch_size,
            seed=recipe.train.seed,
            dp_rank=mesh.dp_rank,
            dp_size=layout.dp,
            micro_batch_multiple=layout.micro_batch_multiple,
            device=mesh.device,
        )
        for name, cache in report.caches.items()
    }
    assets = Assets(recipe.model.hf, recipe.tokenizer_dir, template_text(recipe.data.chat_template))
    root = recipe.run_dir / "checkpoints"
    checkpoints = NativeCheckpoints(
        root, recipe.checkpoint, mesh, wrapped, optimizer, assets=assets, recipe=dump(recipe)
    )
    newest = store.latest(root)
    first_step = 0
    if newest is not None:
        if recipe.checkpoint.resume == "never":
            raise CheckpointError(
                f"{root}: has {newest.name}, and checkpoint.resume is never; choose another run_dir, or resume: auto"
            )
        first_step = _resume(checkpoints, newest, report, loaders["train"].fingerprint)

    log = MetricsLog.for_rank(
        mesh.rank, recipe.run_dir, first_step=first_step, total_steps=report.total_steps
    )
    left = store.passed_over(root)
    log.start(
        report.facts()
        | {
            "attention": f"{choose_kernel(mesh.device, dtype).__name__} on {mesh.device.type}",
            "start": f"step {first_step}"
            + (f", resumed from {newest}" if newest else "")
            + (f"; passed over {', '.join(left)}, not finished" if left else ""),
        }
    )
    return Trainer(
        arch=arch,
        mesh=mesh,
        chunks=wrapped,
        objective=OBJECTIVES[recipe.objective](),
        optimizer=optimizer,
        schedule=recipe.optimizer,
        train_loader=loaders["train"],
        validation={
            name.removeprefix("validation/"): loader for name, loader in loaders.items() if name != "train"
        },
        checkpoints=checkpoints,
        export=partial(
            export_hf,
            chunks,
            arch,
            mesh,
            assets=assets,
            dtype=DTYPES[recipe.checkpoint.export_dtype or recipe.model.dtype],
            max_shard_bytes=parse_size(recipe.checkpoint.max_shard_size),
        ),
        export_dir=recipe.run_dir / "hf",
        cadence=Cadence(
            log=recipe.train.log_every_steps,
            evaluate=recipe.train.eval_every_steps,
            save=recipe.checkpoint.save_every_steps,
            export=recipe.checkpoint.export_every_steps,
        ),
        log=log,
        health=Health(
            recipe.run_dir,
            rank=mesh.rank,
            world_size=mesh.world_size,
            device=mesh.device,
            stall_seconds=60 * recipe.train.stall_timeout_minutes,
        ),
        on_nonfinite=recipe.train.on_nonfinite,
        throughput=Throughput(world_size=mesh.world_size, peak=peak_flops(mesh.device)),
        first_step=first_step,
        total_steps=report.total_steps,
    )


def _resume(checkpoints: Any, directory: Path, report: CheckReport, data: str) -> int:
    """The number of steps done.

    Raises:
        CheckpointError: other samples than the checkpoint's would follow.
    """
    progress = checkpoints.load(directory, report.arch)
    if progress.data != data:
        raise CheckpointError(
            f"{directory}: was trained on other samples or packs than data and train now give, so that samples "
            "would be skipped or seen twice; restore data, tokens_per_pack, global_batch_size and seed, or "
            "start a new run_dir from the export"
        )
    return progress.step


@contextmanager
def _rank_0_first(env: RankEnv, world_store: Any) -> Iterator[None]:
    """Run the body on rank 0, then on the others, however long rank 0 takes: it may tokenise for an hour."""
    if env.rank > 0:
        world_store.wait(["rank 0 is ready"], timedelta(days=7))
    yield
    if env.rank == 0:
        world_store.set("rank 0 is ready", "")


def _first_to_fail(env: RankEnv, world_store: list[Any]) -> bool:
    """Whether this rank is the one to print: the first error is the cause, the others only follow from it."""
    if not world_store:
        if env.rank > 0:
            time.sleep(5)  # rank 0 finds the same; who leaves first ends the others, and it has to print
        return env.rank == 0
    try:
        return world_store[0].add("ranks that failed", 1) == 1
    except Exception:  # the store went with the rank that failed first
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
