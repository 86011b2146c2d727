"""A recipe: the parts' sections as one, read, written, agreeing with itself. Looks at no file but its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from paralign.models.arch import Arch
from paralign.models.head_read import Quantity

from ..checkpoint.config import CheckpointConfig
from ..checkpoint.hf import assets_of
from ..config.decoding import Section, decode
from ..config.model import ModelConfig
from ..config.optimizer import OptimizerConfig
from ..config.recipe_file import apply_overrides, dump_yaml, load_recipe_file
from ..data.config import DataConfig
from ..objectives import OBJECTIVES, AnswerSection, ObjectiveConfig
from ..observe.config import ObserveConfig
from ..observe.spikes import SpikeConfig
from ..parallel.layout import Layout, LayoutConfig, resolve


class TrainConfig(Section):
    """How long to train, and what happens along the way.

    Attributes:
        global_batch_size: packs in a step, over all GPUs.
        epochs: passes over the data, at most 1000; or give max_steps.
        max_steps: steps in all; or give epochs.
        seed: of packing, order and random weights.
        eval_every_steps: steps between evaluations, the first before step 0; null never evaluates.
        log_every_steps: steps between log lines.
        generate_samples: prompts of each validation set that are answered at each evaluation, at most.
        generate_max_tokens: greatest length of these answers; each token costs a forward pass over one pack.
        on_nonfinite: what a gradient norm that is not finite does: `stop` saves and ends the run, `skip` leaves
            the step out; both name its samples.
        max_skipped_steps: so many steps left out in a row, whatever for, end the run.
        spike: the section of losses and gradient norms that stand out; null watches none.
        check_replicas_every_steps: steps between comparisons of all copies of each weight; one that differs ends
            the run, and weight and ranks are named; null compares none.
        stall_timeout_minutes: a rank that does not move for so long ends the run, and is named.
    """

    global_batch_size: int = Field(ge=1)
    epochs: int | None = Field(None, ge=1, le=1000)
    max_steps: int | None = Field(None, ge=1)
    seed: int = Field(ge=0)
    eval_every_steps: int | None = Field(None, ge=1)
    log_every_steps: int = Field(1, ge=1)
    generate_samples: int = Field(0, ge=0)
    generate_max_tokens: int = Field(64, ge=1)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_steps: int = Field(10, ge=1)
    spike: SpikeConfig | None = SpikeConfig()
    check_replicas_every_steps: int | None = Field(None, ge=1)
    stall_timeout_minutes: float = Field(20, gt=0)

    @model_validator(mode="after")
    def _agree(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            given = "neither is" if self.epochs is None else "both are"
            raise ValueError(f"give epochs or max_steps; {given} given")
        return self


class Recipe(Section):
    """Everything that a run is made of.

    Attributes:
        objective: what is learned: a name, or the section of an objective with its name.
        model: the model section.
        tokenizer: directory of the tokenizer; null is model.hf.
        layout: the section of degrees of parallelism.
        data: the section of files and packs.
        optimizer: the section of AdamW and its schedule.
        train: the section of batch size and length.
        checkpoint: the section of what is saved.
        observe: the section of what is shown besides the console and metrics.jsonl.
        run_dir: where everything of this run is written.
    """

    objective: ObjectiveConfig
    model: ModelConfig
    tokenizer: Path | None = None
    layout: LayoutConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    observe: ObserveConfig = ObserveConfig()
    run_dir: Path

    @property
    def tokenizer_dir(self) -> Path:
        return self.tokenizer or assets_of(self.model.hf)

    def resolve_layout(self, arch: Arch, world_size: int) -> Layout:
        """The layout on so many ranks; raises LayoutError where it cannot be."""
        return resolve(
            self.layout,
            arch,
            world_size=world_size,
            global_batch_size=self.train.global_batch_size,
            tokens_per_pack=self.data.tokens_per_pack,
        )

    @model_validator(mode="after")
    def _answers_are_whole(self) -> Recipe:
        if not isinstance(self.objective, AnswerSection):
            return self
        for key, value, allowed in (
            ("too_long", self.data.too_long, ("drop", "error")),
            ("format", self.data.format, ("auto",)),
            ("loss_on", self.data.loss_on, ("assistant",)),
            ("nothing_to_learn", self.data.nothing_to_learn, ("error",)),
        ):
            if value not in allowed:
                raise ValueError(
                    f"data.{key}: {value} is not for answers to prompts, which are learned whole; "
                    f"objective {self.objective.name} takes {' or '.join(allowed)}"
                )
        if self.train.generate_samples:
            raise ValueError("train.generate_samples answers conversations, not preferences; delete it")
        return self

    @model_validator(mode="after")
    def _head_has_tokens(self) -> Recipe:
        of_tokens = [name for name in self.observe.token_metrics if name != "num_tokens"]
        if of_tokens and Quantity.VALUE in OBJECTIVES[self.objective.name].asks:
            raise ValueError(
                f"observe.token_metrics: {' and '.join(of_tokens)} need a language model's head, and objective "
                f"{self.objective.name} has a scalar one; leave num_tokens only"
            )
        return self

    @model_validator(mode="after")
    def _stalls_are_found_first(self) -> Recipe:
        if self.train.stall_timeout_minutes >= self.layout.distributed_timeout_minutes:
            raise ValueError(
                f"train.stall_timeout_minutes {self.train.stall_timeout_minutes:g} must be below "
                f"layout.distributed_timeout_minutes {self.layout.distributed_timeout_minutes}, "
                "or a collective gives up before the slow rank is named"
            )
        return self

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.train.eval_every_steps and not self.data.validation:
            raise ValueError("train.eval_every_steps needs a set in data.validation; name one")
        if self.train.generate_samples and not self.train.eval_every_steps:
            raise ValueError("train.generate_samples answers at evaluations; give train.eval_every_steps")
        if self.train.generate_samples and self.data.loss_on == "all":
            raise ValueError(
                "train.generate_samples needs answers that stand apart from prompts, and data.loss_on is all; "
                "choose assistant or last"
            )
        best, metrics = (
            self.checkpoint.keep_best,
            [f"validation/{name}/loss" for name in self.data.validation],
        )
        if best and best not in metrics:
            known = f"this recipe has {', '.join(metrics)}" if metrics else "name a set in data.validation"
            raise ValueError(f"checkpoint.keep_best {best!r} is no metric of the validation sets; {known}")
        if best and not (self.train.eval_every_steps and self.checkpoint.save_every_steps):
            raise ValueError(
                "checkpoint.keep_best needs train.eval_every_steps and checkpoint.save_every_steps; give both"
            )
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and sets `key.sub=value` overrides. Raises RecipeError with a line per problem.

    Paths in a recipe are relative to the current directory, not to the recipe.
    """
    tree, marks = apply_overrides(*load_recipe_file(path), overrides)
    return decode(Recipe, tree, marks, path)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults and overrides included; `load` reads it back equal."""
    return dump_yaml(recipe.model_dump(mode="json"))
