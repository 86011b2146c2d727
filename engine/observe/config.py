"""The `observe:` section of a recipe: trackers, traces, metrics of tokens."""

from __future__ import annotations

import importlib.util
from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from paralign.models.errors import RecipeError

from ..config.decoding import Section

TokenMetric = Literal["entropy", "mean_token_accuracy", "num_tokens"]


class WandbConfig(Section):
    """Where Weights & Biases puts the run. A resumed run goes on under the same id.

    Attributes:
        project: project there.
        entity: user or team; null is the default of the account.
        name: of the run; null is the name of run_dir.
        mode: `offline` writes to run_dir/wandb only, for `wandb sync` later.
    """

    project: str = Field(min_length=1)
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class ProfileConfig(Section):
    """Steps that are traced by torch.profiler, on every rank.

    Attributes:
        from: the first step, from 0; not the very first of a run, which allocates and compiles.
        to: the step before which tracing ends.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    first: int = Field(alias="from", ge=0)
    to: int

    @model_validator(mode="after")
    def _agree(self) -> ProfileConfig:
        if self.to <= self.first:
            raise ValueError(f"to {self.to} is not behind from {self.first}; give at least {self.first + 1}")
        return self


class ObserveConfig(Section):
    """What a run shows besides the console and metrics.jsonl.

    Attributes:
        token_metrics: TRL's metrics of the learned tokens, computed beside the loss: `entropy` of the policy in nats,
            `mean_token_accuracy`, the share of tokens that were likeliest (of pairs the chosen answers' alone), and
            `num_tokens`, all tokens trained on so far, a prompt counted with each of its answers.
        tensorboard: writes events to run_dir/tensorboard.
        wandb: the section of Weights & Biases; null sends nothing.
        profile: the section of steps to trace; null traces none.
    """

    token_metrics: tuple[TokenMetric, ...] = ()
    tensorboard: bool = False
    wandb: WandbConfig | None = None
    profile: ProfileConfig | None = None


def check_installed(config: ObserveConfig) -> None:
    """Raises RecipeError where the recipe asks for a package that is not there."""
    for package, asked in (("tensorboard", config.tensorboard), ("wandb", config.wandb is not None)):
        if asked and importlib.util.find_spec(package) is None:
            raise RecipeError(
                f"observe.{package}: the package {package} is not installed; pip install 'paralign[track]'"
            )
