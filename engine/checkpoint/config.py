"""The `checkpoint:` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config.decoding import Section


class CheckpointConfig(Section):
    """When training state and Hugging Face weights are written, and which of them stay.

    Attributes:
        save_every_steps: steps between training states; null saves none by steps.
        save_every_minutes: a training state at the first step after so many minutes without one, beside those by
            steps; null saves none by the clock.
        keep_last: how many of the newest training states stay; null keeps all.
        keep_best: a metric, such as validation/chat/loss; the state where it is lowest stays too.
        async_save: writes while training goes on.
        layout: where a state goes on: `any` at any layout; `same` at the one that it was saved at, with any number of
            copies of the model: the optimizer is saved as Megatron's buckets (`dp_reshardable`). What a signal, a
            stop or the end of the run saves goes on at any.
        export_every_steps: steps between Hugging Face exports during training; null exports at the end only.
        export_dtype: dtype of exports; null keeps the model's.
        max_shard_size: largest safetensors file of an export, such as 5GB or 512MiB.
        resume: `auto` goes on from the newest state in run_dir, `never` refuses a run_dir that has one.
    """

    save_every_steps: int | None = Field(None, ge=1)
    save_every_minutes: float | None = Field(None, gt=0)
    keep_last: int | None = Field(None, ge=1)
    keep_best: str | None = None
    async_save: bool = False
    layout: Literal["any", "same"] = "any"
    export_every_steps: int | None = Field(None, ge=1)
    export_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    max_shard_size: str = Field("5GB", pattern=r"^[1-9][0-9]*[KMGT]i?B$")
    resume: Literal["auto", "never"] = "auto"
