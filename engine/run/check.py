"""Whether a recipe can run: its parts against each other and against what lies on disk.

Cheap checks come first, so that a wrong layout is told before an hour of tokenising. Needs no megatron-core
and no GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.panel import Panel

from paralign.models import parameter_count
from paralign.models.arch import Arch
from paralign.models.errors import CheckpointError, DataError, RecipeError, WeightsError

from ..backends import check_backend
from ..batch import Head
from ..checkpoint import store
from ..checkpoint.file_manifest import broken_files
from ..checkpoint.hf import arch_of
from ..checkpoint.source import open_source
from ..checkpoint.state_bytes import state_bytes
from ..columns.sources import BASELINE, DATA, REFERENCE, Source, in_order
from ..config.decoding import some_of
from ..config.optimizer import warmup_steps
from ..data.answers import AnswerLayout
from ..data.cache import TokenCache, build_or_open
from ..data.config import SourceConfig
from ..data.epochs import Epochs, StepStatistics, packing_of, step_statistics
from ..data.packing import MIXED
from ..data.tokenizer import largest_id
from ..files.refused import check_writable
from ..objectives import AnswerSection, Objective, ReferenceSection, build_objective
from ..observe.config import check_installed
from ..observe.metrics import facts_block
from ..parallel.layout import Layout, layers_of_stage, stage_rules
from ..processes.slurm import waits_of_slurm
from .recipe import Recipe

SAVE_BYTES_PER_SECOND = (
    5e8  # of a rank that serialises, hashes and writes to a shared file system, if it is slow
)
TORCHRUN_WAITS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
ENOUGH_TIME = {  # what to do where SLURM leaves too little of it
    "KillWait": "before scancel use `scancel --signal=USR1 JOB`",
    "GraceTime": "before preemption have PreemptParameters=send_user_signal or a longer GraceTime in SLURM, or lose "
    "little: checkpoint.save_every_minutes",
}


@dataclass(frozen=True)
class CheckReport:
    """What a recipe comes to.

    Attributes:
        layout: resolved for the number of GPUs that was asked about.
        parameters: of the whole model.
        parameters_per_rank: of the fullest rank, vocabulary padding included.
        caches: tokens by set: `train`, and `validation/NAME`.
        steps: what the training steps of an epoch hold.
        total_steps: optimizer steps of the run.
        packing: version of the plans of packs, that of the run's checkpoints if it has any.
    """

    recipe: Recipe
    arch: Arch
    layout: Layout
    parameters: int
    parameters_per_rank: int
    caches: Mapping[str, TokenCache]
    steps: StepStatistics
    total_steps: int
    packing: int

    @property
    def save_seconds(self) -> float:
        """What a checkpoint takes at `SAVE_BYTES_PER_SECOND`, each rank writing its part."""
        weight = 2 if self.recipe.model.dtype == "bf16" else 4
        written = state_bytes(self.parameters_per_rank, dp=self.layout.dp, weight=weight).disk
        return written / SAVE_BYTES_PER_SECOND

    @property
    def state_bytes_per_rank(self) -> float:
        """Of the fullest rank. A parameter takes its weight and an fp32 gradient; the two fp32 moments, and in bf16
        the fp32 weight, are shared by the data-parallel ranks."""
        here, shared = (2 + 4, 12) if self.recipe.model.dtype == "bf16" else (4 + 4, 8)
        objective, optimizer = self.recipe.objective, self.recipe.optimizer
        if isinstance(objective, ReferenceSection) and objective.reference == "online":
            here += 2 if self.recipe.model.dtype == "bf16" else 4
        moments_elsewhere = 8 * optimizer.optimizer_cpu_offload * optimizer.optimizer_offload_fraction
        return self.parameters_per_rank * (here + (shared - moments_elsewhere) / self.layout.dp)

    def facts(self) -> dict[str, str]:
        """The report in words."""
        layout, steps, train = self.layout, self.steps, self.recipe.train
        chunks = f", {layout.vpp} chunks a stage" if layout.vpp > 1 else ""
        epochs = (
            f"{train.epochs} epochs of about {self.total_steps / train.epochs:,.0f}: " if train.epochs else ""
        )
        if train.epochs and self.total_steps == train.epochs * steps.steps:
            epochs = f"{train.epochs} epochs × {steps.steps:,} = "
        return {
            "model": f"{self.recipe.model.hf}: {self.arch.family}, {_billions(self.parameters)} parameters, "
            f"{self.recipe.model.dtype}, from {self.recipe.model.init}",
            "layout": f"{layout.world_size} GPUs = tp {layout.tp} × pp {layout.pp} × dp {layout.dp}{chunks}; "
            f"at most {_billions(self.parameters_per_rank)} parameters a GPU",
            "state": f"at most {self.state_bytes_per_rank / 1e9:.3g} GB a GPU for weights, gradients and optimizer; "
            "activations come on top",
            **{name: _described(cache) for name, cache in self.caches.items()},
            "packs": f"{steps.packs:,} of {self.recipe.data.tokens_per_pack:,} tokens, "
            f"{steps.utilisation:.1%} of them real",
            "a step": f"{train.global_batch_size} packs, {layout.micro_batches} on each of dp {layout.dp}; "
            f"{_spread(steps.samples)} samples, {_spread(steps.loss_tokens)} tokens with a loss",
            **({"to stop": self._time_to_stop()} if self.save_seconds >= 1 else {}),
            "steps": f"{epochs}{self.total_steps:,}",
            "run_dir": str(self.recipe.run_dir),
        }

    def _time_to_stop(self) -> str:
        """How long a save takes beside what torchrun and SLURM leave of time after SIGTERM."""
        needed = self.save_seconds
        words = f"a save takes about {needed:,.0f} s at {SAVE_BYTES_PER_SECOND / 1e9:g} GB/s a rank"
        agent = int(os.environ.get(TORCHRUN_WAITS, "30"))
        if needed > agent / 2:
            words += f"; torchrun waits {agent} s after SIGTERM: set {TORCHRUN_WAITS}={math.ceil(2 * needed)}"
        for name, waits in waits_of_slurm().items():
            if needed > waits / 2:
                words += f"; SLURM's {name} is {waits} s: {ENOUGH_TIME[name]}"
        return words

    def __rich__(self) -> Panel:
        return facts_block("paralign", self.facts())


def check(
    recipe: Recipe, gpus: int | None = None, *, progress: bool = False, verify: bool = True
) -> CheckReport:
    """Checks a recipe, tokenising its data if that was not done before.

    Args:
        gpus: what the layout is checked for; None is one copy of the model, tp × pp.
        progress: show a bar while tokenising.
        verify: compare tokens with their checksums.

    Raises:
        RecipeError, LayoutError, WeightsError, DataError: the first part that is wrong.
    """
    config, data, train = recipe.layout, recipe.data, recipe.train
    objective = build_objective(recipe.objective)
    sources_of_columns(recipe)
    arch = _arch_to_train(recipe, objective)
    layout = recipe.resolve_layout(
        arch, gpus or config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    )
    _check_recompute(recipe, layout, arch)
    check_backend(recipe.model, arch)
    check_installed(recipe.observe)
    _check_files(recipe, arch)
    caches = _open_sets(recipe, arch, progress=progress, verify=verify)
    samples = caches["train"]
    packing = packing_of_run(recipe.run_dir)
    epochs = Epochs(samples, global_batch_size=train.global_batch_size, seed=train.seed, packing=packing)
    steps = step_statistics(
        epochs.plan(0),
        samples.lengths,
        samples.n_loss,
        tokens_per_pack=data.tokens_per_pack,
        global_batch_size=train.global_batch_size,
    )
    total_steps = train.max_steps or epochs.first_step(train.epochs or 0)
    _check_steps(recipe, total_steps)
    return CheckReport(
        recipe,
        arch,
        layout,
        parameter_count(arch),
        _parameters_per_rank(layout, arch),
        caches,
        steps,
        total_steps,
        packing,
    )


def packing_of_run(run_dir: Path) -> int:
    """How a run packs its samples: as the newest checkpoint says whose progress is as it was written, or as new runs
    do. A run has one way of packing, so that any of its checkpoints will do."""
    for checkpoint in reversed(store.complete(run_dir / "checkpoints")):
        try:
            if not broken_files(checkpoint, [store.PROGRESS]):
                return packing_of(store.read_progress(checkpoint).data)
        except CheckpointError:  # a run that cannot go on from it says so
            continue
    return MIXED


def _arch_to_train(recipe: Recipe, objective: Objective) -> Arch:
    """The model's, with the head that the objective needs."""
    arch = arch_of(recipe.model.hf)
    if objective.head is Head.SCALAR:
        return arch.with_scalar_head()
    if arch.scalar_head:
        raise RecipeError(
            f"model.hf {recipe.model.hf}: a reward model; objective {recipe.objective.name} needs a language model"
        )
    return arch


def sources_of_columns(recipe: Recipe) -> list[Source]:
    """What fills the columns that no data give, in order; RecipeError if that does not come out."""
    objective = build_objective(recipe.objective)
    others = [REFERENCE] if isinstance(recipe.objective, ReferenceSection) else []
    return in_order(objective.needs, DATA[objective.reads], [*others, BASELINE])


def open_set(
    recipe: Recipe, sources: Sequence[SourceConfig], *, progress: bool, verify: bool = True
) -> TokenCache:
    """The tokens of one set, as the objective reads its records."""
    section = recipe.objective
    objective = build_objective(section)
    share_prefix, range_of_scores = True, None
    if isinstance(section, AnswerSection):
        share_prefix, range_of_scores = section.share_prefix, section.range_of_scores
    needs = objective.needs.union(*(source.needs for source in sources_of_columns(recipe)))
    layout = AnswerLayout(needs, objective.head, share_prefix)
    return build_or_open(
        recipe.data,
        sources,
        recipe.tokenizer_dir,
        objective.reads,
        layout,
        range_of_scores,
        progress=progress,
        verify=verify,
    )


def _check_files(recipe: Recipe, arch: Arch) -> None:
    """Data, weights and tokenizer are there and fit each other, as far as headers say; run_dir can be written."""
    check_writable(recipe.run_dir, RecipeError)
    absent = [
        f"data.{name.replace('/', '.')}: {source.path}"
        for name, sources in recipe.data.sets.items()
        for source in sources
        if not source.path.exists()
    ]
    if absent:
        raise DataError(some_of([f"{place}: no such file, seen from {Path.cwd()}" for place in absent]))
    if recipe.model.init == "weights":
        open_source(recipe.model.hf)
    _check_vocabulary(largest_id(recipe.tokenizer_dir), recipe, arch)


def _open_sets(recipe: Recipe, arch: Arch, *, progress: bool, verify: bool) -> dict[str, TokenCache]:
    """The tokens of every set, which the model can take."""
    caches = {}
    for name, sources in recipe.data.sets.items():
        cache = caches[name] = open_set(recipe, sources, progress=progress, verify=verify)
        _check_vocabulary(cache.max_token, recipe, arch)
        if (longest := int(cache.lengths.max())) > arch.max_position_embeddings:
            raise RecipeError(
                f"data.{name.replace('/', '.')}: a sample of {longest:,} tokens is longer than "
                f"max_position_embeddings {arch.max_position_embeddings:,} in {recipe.model.hf}/config.json; "
                "lower data.tokens_per_pack, or raise max_position_embeddings if the model can do more"
            )
    return caches


def _check_steps(recipe: Recipe, total_steps: int) -> None:
    """Warm-up and traces end before the run does."""
    if (warmup := warmup_steps(recipe.optimizer, total_steps)) >= total_steps and warmup > 1:
        raise RecipeError(
            f"optimizer: a warm-up of {warmup} steps leaves none of the {total_steps} steps of the run; "
            "lower lr_warmup_steps"
        )
    if (window := recipe.observe.profile) and window.to > total_steps:
        raise RecipeError(
            f"observe.profile: traces up to step {window.to}, and the run has {total_steps} steps; lower from and to"
        )


def _check_recompute(recipe: Recipe, layout: Layout, arch: Arch) -> None:
    """Megatron reads past the last layer of a chunk where groups of layers do not divide it."""
    group = recipe.model.recompute_num_layers
    if recipe.model.recompute_method != "uniform" or not group:
        return
    for chunks in layers_of_stage(layout, arch):
        if len(chunks[0]) % group:
            raise RecipeError(
                f"model.recompute_num_layers: {group} does not divide the {len(chunks[0])} layers "
                "of a chunk; give a divisor, such as 1"
            )


def _check_vocabulary(id_: int, recipe: Recipe, arch: Arch) -> None:
    if id_ >= arch.vocab_size:
        raise WeightsError(
            f"{recipe.tokenizer_dir}: the tokenizer has token {id_}, but vocab_size is "
            f"{arch.vocab_size} in {recipe.model.hf}/config.json; is this the tokenizer of this model?"
        )


def _parameters_per_rank(layout: Layout, arch: Arch) -> int:
    stages = stage_rules(layout, arch)
    if arch.tied and layout.pp > 1:  # the last stage holds a copy of the embedding as its head
        stages[-1].append(stages[0][0])
    return max(sum(math.prod(rule.shard_shape(layout.tp)) for rule in rules) for rules in stages)


def _described(cache: TokenCache) -> str:
    left_out = {
        "too long": cache.n_dropped,
        "with nothing to learn": cache.n_skipped,
        "cut": cache.n_truncated,
        "that cannot be read": sum(cache.n_bad),
    }
    notes = "".join(f"; {count:,} {what}" for what, count in left_out.items() if count)
    if cache.has_answers:
        return (
            f"{len(cache):,} prompts with {int(cache.n_answers.sum()):,} answers, "
            f"{int(cache.lengths.sum()):,} rows{notes}"
        )
    return f"{len(cache):,} samples, {int(cache.lengths.sum()):,} tokens{notes}"


def _spread(mean_and_sd: tuple[float, float]) -> str:
    mean, sd = mean_and_sd
    return f"{mean:,.0f} ± {sd:,.0f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e7 else f"{count:,}"
