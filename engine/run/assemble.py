"""From a checked recipe to a trainer, in five builds: model, steps, learner, checkpoints, watch."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from paralign.models import FAMILIES, scoring_class
from paralign.models.arch import Arch
from paralign.models.errors import CheckpointError, RecipeError, TrainingError, WeightsError

from ..backends import backend_of
from ..batch import Kind
from ..checkpoint import store
from ..checkpoint.hf import Assets, Scorer, arch_of, copy_assets, parse_size
from ..checkpoint.source import check_share, open_source
from ..columns.fillers import Baseline, KeptReference, score_answers
from ..columns.reference import MadeBy, read_or_score, weights_digest
from ..columns.sources import BASELINE, REFERENCE, Filler
from ..columns.steps import Steps
from ..data.cache import stop_token
from ..data.epochs import Share
from ..data.loader import PackLoader
from ..data.render import template_text
from ..data.tokenizer import padding_token
from ..files.refused import refusals_told
from ..files.whole_file import replace_directory
from ..objectives import ReferenceSection, build_objective
from ..objectives.measures import with_measures
from ..observe.health import Health
from ..observe.memory import Memory
from ..observe.metrics import MetricsLog
from ..observe.own_work import OwnWork
from ..observe.profiler import Profiler
from ..observe.throughput import Throughput, peak_flops
from ..observe.watch import Watch
from ..parallel.mesh import Mesh
from ..processes.stop import Stop
from ..rollout.generate import Generations
from ..training.build import DTYPES, Read, random_weights
from ..training.export import export_hf
from ..training.learner import Learner
from ..training.model import Model
from ..training.optim import Optimizer
from ..training.resuming import newest_whole
from ..training.soundness import refuse_not_finite
from ..training.state import NativeCheckpoints
from .check import CheckReport, sources_of_columns
from .judge import Judge
from .recipe import Recipe, dump
from .trainer import Course, Trainer

TRAIN = "train"
BAD_FILES = "get the files anew, or give weights that are finite"


def build_trainer(report: CheckReport, mesh: Mesh, stop: Stop, replay_step: int | None = None) -> Trainer:
    """What one rank trains with, in the state of the newest checkpoint. Collective.

    Args:
        stop: asked at each step.
        replay_step: take the newest checkpoint from before this step, and log nothing.
    """
    recipe = report.recipe
    read = weights_to_start_from(recipe, report.arch, mesh)
    model = Model.open(report.arch, mesh, recipe.model, read)
    if replay_step is None:  # a replay says where the fault is
        refuse_not_finite(model, recipe.model.hf, BAD_FILES, WeightsError)
    steps = build_steps(report, model, read)  # other models are read before this one is wrapped to train
    learner = build_learner(report, model)
    assets = assets_to_hand_on(report)
    if mesh.is_main and replay_step is None:
        assets = kept_with_the_run(assets, recipe.run_dir / "assets", DTYPES[recipe.model.dtype])
    checkpoints, start = build_checkpoints(report, learner, assets, steps[TRAIN].fingerprint, replay_step)
    if replay_step is None and start.newest is not None:
        remedy = "remove that checkpoint, and the run goes on from the one before it"
        refuse_not_finite(model, start.newest, remedy, CheckpointError)
    watch = build_watch(report, model, stop, start, logs=replay_step is None)
    validation = {name: found for name, found in steps.items() if name != TRAIN}
    return Trainer(
        learner=learner,
        train=steps[TRAIN],
        validation=validation,
        checkpoints=checkpoints,
        export=lambda name: export_hf(
            model,
            recipe.run_dir / "hf" / name,
            assets=assets,
            dtype=DTYPES[recipe.checkpoint.export_dtype or recipe.model.dtype],
            max_shard_bytes=parse_size(recipe.checkpoint.max_shard_size),
            moved=watch.moved,
        ),
        course=Course(
            first_step=start.step,
            total_steps=report.total_steps,
            log=recipe.train.log_every_steps,
            evaluate=recipe.train.eval_every_steps,
            export=recipe.checkpoint.export_every_steps,
            export_missing=replay_step is None and export_is_missing(recipe, mesh, start.step),
            compare_copies=recipe.train.check_replicas_every_steps,
            counts_tokens="num_tokens" in recipe.observe.token_metrics,
        ),
        generations=Generations(
            model,
            {name: found.loader.cache for name, found in validation.items()},
            recipe.tokenizer_dir,
            recipe.run_dir,
            n_samples=recipe.train.generate_samples,
            max_new_tokens=recipe.train.generate_max_tokens,
            first_step=start.step,
            moved=watch.moved,
        )
        if recipe.train.generate_samples and replay_step is None
        else None,
        watch=watch,
        judge=Judge(
            mesh,
            on_nonfinite=recipe.train.on_nonfinite,
            max_skipped=recipe.train.max_skipped_steps,
            spike=recipe.train.spike,
            window=start.window,
        ),
    )


def weights_to_start_from(recipe: Recipe, arch: Arch, mesh: Mesh) -> Read:
    """A reader of the weights before the first step; a scalar head that the model lacks is drawn at random."""
    drawn = random_weights(arch, seed=recipe.train.seed, dtype=DTYPES[recipe.model.dtype], device=mesh.device)
    if recipe.model.init == "random":
        return drawn
    reader = open_source(recipe.model.hf)
    check_share(reader, mesh.rank, mesh.world_size)
    if arch.scalar_head == reader.arch.scalar_head:
        return reader.read
    return lambda name: drawn(name) if name == "score.weight" else reader.read(name)


def build_steps(report: CheckReport, policy: Model, read: Read) -> dict[str, Steps]:
    """The steps of each set, `train` and those of validation by their names.

    Args:
        policy: with the weights to start from, not yet prepared to train.
        read: reads these weights.
    """
    mesh, train = policy.mesh, report.recipe.train
    loaders = {
        name.removeprefix("validation/"): PackLoader(
            cache,
            global_batch_size=train.global_batch_size,
            seed=train.seed,
            share=Share(mesh.dp.rank, mesh.dp.size, mesh.layout.micro_batch_multiple),
            device=mesh.device,
            packing=report.packing,
        )
        for name, cache in report.caches.items()
    }
    fillers: dict[str, list[Filler]] = {name: [] for name in loaders}
    for source in sources_of_columns(report.recipe):
        found = {
            REFERENCE: lambda: reference_fillers(report, policy, read, loaders),
            BASELINE: lambda: dict.fromkeys(loaders, Baseline(policy)),
        }[source]()
        for name in loaders:
            fillers[name].append(found[name])
    return {name: Steps(loader, fillers[name]) for name, loader in loaders.items()}


def reference_fillers(
    report: CheckReport, policy: Model, read: Read, loaders: Mapping[str, PackLoader]
) -> Mapping[str, Filler]:
    """For each set a reference model that is kept, or its log-probabilities.

    Where they have to be computed, the policy lends its place, so that no second model is ever in memory.
    """
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
    read_reference = read
    if other:
        reader = open_source(directory)
        check_share(reader, policy.mesh.rank, policy.mesh.world_size)
        read_reference = reader.read
    if section.reference == "online":
        reference = Model.open(arch, policy.mesh, recipe.model, read_reference)
        refuse_not_finite(reference, directory, BAD_FILES, WeightsError)
        return dict.fromkeys(loaders, KeptReference(reference))
    template = template_text(recipe.data.chat_template) or "tokenizer"
    dtype = str(DTYPES[recipe.model.dtype])
    if recipe.model.init == "random" and not other:
        weights = hashlib.sha256(f"random {recipe.train.seed} {arch} {dtype}".encode()).hexdigest()[:32]
    else:
        weights = weights_digest(directory, dtype=dtype)
    made_by = MadeBy(weights, data="", template=hashlib.sha256(template.encode()).hexdigest()[:32])

    def score(steps: Any, n_answers: int) -> Any:
        with policy.lent(read_reference) if other else nullcontext():
            refuse_not_finite(policy, directory, BAD_FILES, WeightsError)
            return score_answers(policy, steps, n_answers)

    return read_or_score(loaders, made_by, policy.mesh, score, total_steps=report.total_steps)


def build_learner(report: CheckReport, model: Model) -> Learner:
    """The objective and the optimizer for a model, which is prepared to train here."""
    recipe = report.recipe
    model.prepare_to_train()
    optimizer = Optimizer(
        model.chunks,
        recipe.optimizer,
        report.layout,
        DTYPES[recipe.model.dtype],
        fused=backend_of(recipe.model).fuses_updates,
    )
    objective = with_measures(
        build_objective(recipe.objective),
        [source.name for source in recipe.data.train],
        recipe.observe.token_metrics,
    )
    return Learner(model, objective, optimizer, recipe.optimizer, report.total_steps)


def assets_to_hand_on(report: CheckReport) -> Assets:
    """Config and tokenizer that belong to every checkpoint and export of the run."""
    recipe, cache = report.recipe, report.caches[TRAIN]
    scorer = None
    if report.arch.scalar_head:
        ends, size = cache.last_tokens(), report.arch.vocab_size
        pad = padding_token(recipe.tokenizer_dir, ends=ends, vocab_size=size)
        scorer = Scorer(scoring_class(FAMILIES[report.arch.family].architectures[0]), *pad)
    learns_chats = build_objective(recipe.objective).reads is Kind.CONVERSATIONS
    return Assets(
        recipe.model.hf,
        recipe.tokenizer_dir,
        template_text(recipe.data.chat_template),
        scorer,
        stop_token(cache) if learns_chats else None,
    )


def kept_with_the_run(assets: Assets, directory: Path, dtype: torch.dtype) -> Assets:
    """The same, copied to a directory of the run: the model that it started from may go away while it trains."""
    partial = directory.with_name(f"{directory.name}.part")
    with refusals_told(partial):
        shutil.rmtree(partial, ignore_errors=True)
        copy_assets(assets, partial, dtype=str(dtype).removeprefix("torch."))
        replace_directory(partial, directory)
    return replace(assets, model=directory, tokenizer=directory)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        newest: the checkpoint that it goes on from, if any.
        passed_over: names of those that are not finished.
        broken: newer ones that are not as they were written, and why.
        checked: its files are as they were written; those of older versions have no checksums.
        window: of `Spikes`, as that checkpoint has it.
    """

    step: int
    newest: Path | None
    passed_over: Sequence[str]
    broken: Sequence[str] = ()
    checked: bool = True
    window: Sequence[Sequence[float]] = ()

    @property
    def text(self) -> str:
        """The same in words."""
        resumed = f", resumed from {self.newest}" if self.newest else ""
        if self.newest and not self.checked:
            resumed += ", which an older version wrote without checksums: not checked"
        left = f"; passed over {', '.join(self.passed_over)}, not finished" if self.passed_over else ""
        broken = f"; set aside as broken: {', '.join(self.broken)}" if self.broken else ""
        return f"step {self.step}{resumed}{left}{broken}"


def build_checkpoints(
    report: CheckReport, learner: Learner, assets: Assets, fingerprint: str, replay_step: int | None
) -> tuple[NativeCheckpoints, Start]:
    """The run's checkpoints, and where it begins: the learner has the state of the newest of them.

    Raises:
        CheckpointError: there is one and the recipe forbids to go on, or other samples than its own would follow.
    """
    recipe = report.recipe
    root = recipe.run_dir / "checkpoints"
    checkpoints = NativeCheckpoints(
        root, recipe.checkpoint, learner.model, learner.optimizer, assets=assets, recipe=dump(recipe)
    )
    mesh = learner.model.mesh
    _refuse_unless_equal(fingerprint, mesh)
    fresh = recipe.checkpoint.resume == "never" and replay_step is None
    if fresh and (there := mesh.from_main(lambda: store.latest(root))):
        raise CheckpointError(
            f"{root}: has {there.name}, and checkpoint.resume is never; choose another run_dir, or resume: auto"
        )
    found = newest_whole(root, mesh, at_most=replay_step, set_aside=replay_step is None)
    if (newest := found.newest) is None:
        return checkpoints, Start(0, None, found.passed_over)
    progress = checkpoints.load(newest)
    if progress.data != fingerprint:
        raise CheckpointError(
            f"{newest}: was trained on other samples or packs than data and train now give, so that samples "
            "would be skipped or seen twice; restore data, tokens_per_pack, global_batch_size and seed, or "
            "start a new run_dir from the export"
        )
    return checkpoints, Start(
        progress.step,
        newest,
        found.passed_over,
        found.broken,
        checked=progress.manifest,
        window=progress.window,
    )


def write_again(report: CheckReport, mesh: Mesh) -> Path:
    """Write the newest checkpoint of a run again, so that it goes on at any layout. Collective.

    Returns:
        Its directory.

    Raises:
        CheckpointError: there is none, or it was saved at another layout than this one.
    """
    recipe = report.recipe
    root = recipe.run_dir / "checkpoints"
    found = newest_whole(root, mesh, at_most=None, set_aside=False)
    if (newest := found.newest) is None:
        raise CheckpointError(
            f"{root}: has no checkpoint to write again; expected the recipe of a run with one"
        )
    model = Model.open(report.arch, mesh, recipe.model, weights_to_start_from(recipe, report.arch, mesh))
    optimizer = build_learner(report, model).optimizer
    assets = assets_to_hand_on(report)
    checkpoints = NativeCheckpoints(
        root, recipe.checkpoint, model, optimizer, assets=assets, recipe=dump(recipe)
    )
    checkpoints.save(checkpoints.load(newest), lambda: None, last=True)
    checkpoints.finish()
    return newest


def _refuse_unless_equal(fingerprint: str, mesh: Mesh) -> None:
    """Raises TrainingError where ranks would train on other samples than rank 0. Collective."""
    if len(set(mesh.gather(fingerprint))) > 1:
        raise TrainingError(
            "ranks see other data, caches or checkpoints than rank 0 does; put data, cache_dir and run_dir on a file "
            "system that all nodes share, wait until it shows all of them the same, and start again"
        )


def export_is_missing(recipe: Recipe, mesh: Mesh, step: int) -> bool:
    """Whether the export after so many steps was due, and is not there. Collective."""
    every = recipe.checkpoint.export_every_steps
    if not (every and step) or step % every:
        return False
    return bool(mesh.largest(mesh.is_main and not (recipe.run_dir / "hf" / f"iter_{step:07d}").exists()))


def build_watch(report: CheckReport, model: Model, stop: Stop, start: Start, *, logs: bool) -> Watch:
    """What watches this rank; without `logs` nothing is written of it."""
    recipe, mesh, device = report.recipe, model.mesh, model.mesh.device
    runs = backend_of(recipe.model).facts(report.arch, device, DTYPES[recipe.model.dtype])
    run_dir = recipe.run_dir
    log = MetricsLog()
    if logs:
        log = MetricsLog.for_rank(
            mesh.rank,
            run_dir,
            first_step=start.step,
            total_steps=report.total_steps,
            config=recipe.observe,
            recipe=dump(recipe),
        )
    ranks: dict[str, Any] = {"rank": mesh.rank, "world_size": mesh.world_size, "device": device}
    place = {name: axis.rank for name, axis in mesh.axes.items()}
    layers = [layer for module in model.modules for layer in module.decoder.layers]
    return Watch(
        log,
        Health(run_dir, **ranks, stop=stop, stall_seconds=60 * recipe.train.stall_timeout_minutes),
        Throughput(world_size=mesh.world_size, peak=peak_flops(device)),
        Memory(run_dir, **ranks, place=place),
        Profiler(recipe.observe.profile, run_dir, rank=mesh.rank, device=device),
        OwnWork(layers, gathers=recipe.layout.sequence_parallel, **ranks),
        # One rank asks SLURM what it waits for.
        {**report.facts(), **runs, "start": start.text} if mesh.is_main else {},
    )
