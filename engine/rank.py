"""One rank of a run: recipe to parts to trainer. The table of contents of the engine."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralign.models.errors import CheckpointError, ParalignError, RecipeError

from .backends import backend_of
from .batch import Kind
from .check import CheckReport, check, sources_of_columns
from .checkpoint import store
from .checkpoint.hf import Assets, arch_of, parse_size
from .checkpoint.source import open_source
from .columns import BASELINE, REFERENCE, Filler
from .data.cache import stop_token
from .data.render import template_text
from .launch import RankEnv, rank_environment
from .layout import resolve
from .objectives import ReferenceSection, build_objective
from .recipe import Recipe, dump, load
from .slurm import FAILED
from .stop import EXIT_STOPPED, Stop

REPLAY = "--replay-step="

if TYPE_CHECKING:
    from paralign.models.arch import Arch

    from .build import Read
    from .mesh import Mesh
    from .model import Model
    from .trainer import Trainer


def run(arguments: Sequence[str], stop: Stop) -> int:
    """Train as this process's rank.

    Args:
        arguments: a recipe, keys to set, and perhaps `--replay-step=N`.

    Returns:
        The exit code: 0; 2 for an error that the user can mend; `EXIT_STOPPED` if a signal ended the run and it
        is to be started again.
    """
    env = rank_environment()
    world_store: list[Any] = []  # filled once the ranks have met
    try:
        replay_step, overrides = replay_step_of(arguments[1:])
        recipe = load(Path(arguments[0]), overrides)
        # Arithmetic first: a layout that cannot be must not wait for other ranks.
        resolve(
            recipe.layout,
            arch_of(recipe.model.hf),
            world_size=env.world_size,
            global_batch_size=recipe.train.global_batch_size,
            tokens_per_pack=recipe.data.tokens_per_pack,
        )
        whole = meet_and_train(recipe, env, world_store, stop, replay_step)
    except Exception as error:
        mendable, asked_before = isinstance(error, ParalignError), stop.asked
        text = f"error: {error}" if mendable else traceback.format_exc()
        first = _first_to_fail(env, world_store)
        stop.defer()
        if not mendable:
            # It may follow from the end of a rank that was asked to stop: whoever has started the ranks then asks
            # this one as well, and a line is enough.
            time.sleep(1)
        if follows := stop.asked and not asked_before:
            text = f"error while others stop: {error!r}"
        if first:
            print(text, file=sys.stderr, flush=True)
        if (marker := os.environ.get(FAILED)) and not follows:
            Path(marker).touch()
        # Without waiting: other ranks may sit in a collective that this one will never join.
        sys.stdout.flush()
        os._exit(2 if mendable else 1)
    return 0 if whole else EXIT_STOPPED


def replay_step_of(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """The step of `--replay-step=N`, if given, and the other arguments."""
    found = [argument for argument in arguments if argument.startswith(REPLAY)]
    others = [argument for argument in arguments if not argument.startswith(REPLAY)]
    if not found:
        return None, others
    number = found[-1].removeprefix(REPLAY)
    if not number.isdecimal():
        raise RecipeError(f"{found[-1]}: expected the number of a step, such as {REPLAY}137")
    return int(number), others


def meet_and_train(
    recipe: Recipe, env: RankEnv, world_store: list[Any], stop: Stop, replay_step: int | None = None
) -> bool:
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
        return train(report, stop, local_rank=env.local_rank, replay_step=replay_step)


def train(report: CheckReport, stop: Stop, *, local_rank: int, replay_step: int | None = None) -> bool:
    """Train a checked recipe in an open world, from its newest checkpoint if it has one.

    Args:
        stop: asked at each step.
        replay_step: look at this step only, and write nothing of the run's own; see replay.py.

    Returns:
        Whether the run came to its end.
    """
    from .mesh import open_mesh

    recipe = report.recipe
    if replay_step is not None and replay_step >= report.total_steps:
        raise RecipeError(f"{REPLAY}{replay_step}: the run has the steps 0 to {report.total_steps - 1}")
    if recipe.model.deterministic:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with open_mesh(report.layout, local_rank=local_rank, seed=recipe.train.seed) as mesh:
        trainer = build_trainer(report, mesh, stop, replay_step)
        if replay_step is not None:
            _replay(trainer, replay_step, recipe.run_dir)
            return True
        # A rank that is asked to stop before this leaves by itself, later all of them save together.
        mesh.barrier()
        stop.defer()
        try:
            with trainer.health:
                return trainer.fit()
        finally:
            trainer.profiler.stop()
            trainer.log.close()


def _replay(trainer: Trainer, step: int, run_dir: Path) -> None:
    from rich.console import Console

    from .replay import replay, show

    console = Console(highlight=False, soft_wrap=True)
    if trainer.model.mesh.is_main:
        start = "the first weights" if trainer.first_step == 0 else f"iter_{trainer.first_step:07d}"
        console.print(f"from {start}; {step - trainer.first_step} steps to do again")
    found = replay(trainer, step)
    if trainer.model.mesh.is_main:
        show(found, run_dir / "replay" / f"step_{step:07d}.json", console)


def build_trainer(report: CheckReport, mesh: Mesh, stop: Stop, replay_step: int | None = None) -> Trainer:
    """Model, optimizer, loaders, checkpoints and log of one rank, with the state of the newest checkpoint.

    Args:
        replay_step: take the newest checkpoint from before this step, and log nothing.
    """
    from .build import DTYPES
    from .checkpoint.export import export_hf
    from .checkpoint.native import NativeCheckpoints
    from .data.loader import PackLoader
    from .generate import Generations
    from .model import Model
    from .objectives.measures import with_measures
    from .observe.health import Health
    from .observe.memory import Memory
    from .observe.metrics import MetricsLog
    from .observe.profiler import Profiler
    from .observe.throughput import Throughput, peak_flops
    from .optim import Optimizer
    from .scorer import scorer_of
    from .trainer import Cadence, Trainer

    recipe, arch, layout = report.recipe, report.arch, report.layout
    dtype = DTYPES[recipe.model.dtype]
    backend = backend_of(recipe.model)
    options = {
        "global_batch_size": recipe.train.global_batch_size,
        "seed": recipe.train.seed,
        "dp_rank": mesh.dp.rank,
        "dp_size": layout.dp,
        "micro_batch_multiple": layout.micro_batch_multiple,
        "device": mesh.device,
    }
    loaders = {name: PackLoader(cache, **options) for name, cache in report.caches.items()}
    read = _weights_to_start_from(recipe, arch, mesh)
    model = Model.open(arch, mesh, recipe.model, read)
    fillers = build_fillers(report, model, read, loaders)
    model.prepare_to_train()
    optimizer = Optimizer(model.chunks, recipe.optimizer, layout, dtype, fused=backend.fuses_updates)

    objective = build_objective(recipe.objective)
    cache, learns_answers = report.caches["train"], objective.reads is not Kind.CONVERSATIONS
    scorer = scorer_of(arch, recipe.tokenizer_dir, cache.last_tokens()) if arch.scalar_head else None
    turn_end = None if learns_answers else stop_token(cache)
    assets = Assets(
        recipe.model.hf, recipe.tokenizer_dir, template_text(recipe.data.chat_template), scorer, turn_end
    )
    root = recipe.run_dir / "checkpoints"
    checkpoints = NativeCheckpoints(
        root, recipe.checkpoint, model, optimizer, assets=assets, recipe=dump(recipe)
    )
    newest = store.latest(root, at_most=replay_step)
    first_step = 0
    if newest is not None:
        if recipe.checkpoint.resume == "never" and replay_step is None:
            raise CheckpointError(
                f"{root}: has {newest.name}, and checkpoint.resume is never; choose another run_dir, or resume: auto"
            )
        first_step = _resume(checkpoints, newest, loaders["train"].fingerprint)

    log = MetricsLog()
    if replay_step is None:
        log = MetricsLog.for_rank(
            mesh.rank,
            recipe.run_dir,
            first_step=first_step,
            total_steps=report.total_steps,
            config=recipe.observe,
            recipe=dump(recipe),
        )
    left = store.passed_over(root)
    log.start(
        report.facts()
        | {
            **backend.facts(arch, mesh.device, dtype),
            "start": f"step {first_step}"
            + (f", resumed from {newest}" if newest else "")
            + (f"; passed over {', '.join(left)}, not finished" if left else ""),
        }
    )
    objective = with_measures(
        objective, [source.name for source in recipe.data.train], recipe.observe.token_metrics
    )
    generations = None
    if recipe.train.generate_samples and replay_step is None and not learns_answers:
        generations = Generations(
            model,
            {
                name.removeprefix("validation/"): cache
                for name, cache in report.caches.items()
                if name != "train"
            },
            recipe.tokenizer_dir,
            recipe.run_dir,
            n_samples=recipe.train.generate_samples,
            max_new_tokens=recipe.train.generate_max_tokens,
            first_step=first_step,
        )
    return Trainer(
        model=model,
        objective=objective,
        optimizer=optimizer,
        schedule=recipe.optimizer,
        train_loader=loaders["train"],
        validation={
            name.removeprefix("validation/"): loader for name, loader in loaders.items() if name != "train"
        },
        checkpoints=checkpoints,
        export=partial(
            export_hf,
            model,
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
            stop=stop,
            stall_seconds=60 * recipe.train.stall_timeout_minutes,
        ),
        on_nonfinite=recipe.train.on_nonfinite,
        throughput=Throughput(world_size=mesh.world_size, peak=peak_flops(mesh.device)),
        memory=Memory(
            recipe.run_dir,
            rank=mesh.rank,
            world_size=mesh.world_size,
            place={name: axis.rank for name, axis in mesh.axes.items()},
            device=mesh.device,
        ),
        profiler=Profiler(recipe.observe.profile, recipe.run_dir, rank=mesh.rank, device=mesh.device),
        first_step=first_step,
        total_steps=report.total_steps,
        count_tokens="num_tokens" in recipe.observe.token_metrics,
        generations=generations,
        fillers={name.removeprefix("validation/"): found for name, found in fillers.items()},
    )


def _weights_to_start_from(recipe: Recipe, arch: Arch, mesh: Mesh) -> Read:
    """A reader of the weights before the first step; a scalar head that the model lacks is drawn at random."""
    from .build import DTYPES, random_weights

    drawn = random_weights(arch, seed=recipe.train.seed, dtype=DTYPES[recipe.model.dtype], device=mesh.device)
    if recipe.model.init == "random":
        return drawn
    reader = open_source(recipe.model.hf)
    if arch.scalar_head == reader.arch.scalar_head:
        return reader.read
    return lambda name: drawn(name) if name == "score.weight" else reader.read(name)


def build_fillers(
    report: CheckReport, policy: Model, read: Read, loaders: Mapping[str, Any]
) -> dict[str, list[Filler]]:
    """For each set what fills the columns of its steps that no loader gives, in order."""
    from .score import Baseline

    fillers: dict[str, list[Filler]] = {name: [] for name in loaders}
    for source in sources_of_columns(report.recipe):
        found = {
            REFERENCE: lambda: build_reference(report, policy, read, loaders),
            BASELINE: lambda: dict.fromkeys(loaders, Baseline(policy)),
        }[source]()
        for name in loaders:
            fillers[name].append(found[name])
    return fillers


def build_reference(
    report: CheckReport, policy: Model, read: Read, loaders: Mapping[str, Any]
) -> Mapping[str, Filler]:
    """For each set a reference model that is kept, or its log-probabilities.

    Where they have to be computed, the policy lends its place, so that no second model is ever in memory.

    Args:
        policy: with the weights to start from.
        read: reads these weights.
    """
    from .build import DTYPES
    from .model import Model
    from .reference import MadeBy, read_or_score, weights_digest
    from .score import KeptReference, score_answers

    recipe, arch, section = report.recipe, report.arch, report.recipe.objective
    assert isinstance(section, ReferenceSection)
    directory = section.reference_model or recipe.model.hf
    other = section.reference_model is not None
    theirs = replace(arch_of(directory), dtype=arch.dtype)
    if other and theirs != arch:
        raise RecipeError(
            f"objective.reference_model {directory}: another architecture than model.hf "
            f"({theirs.family}, {theirs.num_layers} layers of {theirs.hidden_size}); give one of the same shape"
        )
    read_reference = open_source(directory).read if other else read
    if section.reference == "online":
        kept = KeptReference(Model.open(arch, policy.mesh, recipe.model, read_reference))
        return dict.fromkeys(loaders, kept)
    template = template_text(recipe.data.chat_template) or "tokenizer"
    dtype = str(DTYPES[recipe.model.dtype])
    if recipe.model.init == "random" and not other:
        weights = hashlib.sha256(f"random {recipe.train.seed} {arch} {dtype}".encode()).hexdigest()[:32]
    else:
        weights = weights_digest(directory, dtype=dtype)
    made_by = MadeBy(weights, data="", template=hashlib.sha256(template.encode()).hexdigest()[:32])

    def score(steps: Any, n_answers: int) -> Any:
        with policy.lent(read_reference) if other else nullcontext():
            return score_answers(policy, steps, n_answers)

    return read_or_score(loaders, made_by, policy.mesh, score, total_steps=report.total_steps)


def _resume(checkpoints: Any, directory: Path, data: str) -> int:
    """The number of steps done.

    Raises:
        CheckpointError: other samples than the checkpoint's would follow.
    """
    progress = checkpoints.load(directory)
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
