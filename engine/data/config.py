"""The `data:` section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..config.decoding import Section
from .conversation import Column

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"]
LossOn = Literal["assistant", "last", "all"]
ChatTemplate = Literal["tokenizer", "llama3", "chatml", "baichuan2"] | Path


class SourceConfig(Section):
    """One file of samples, or one saved data set; a plain path stands for a source of that path.

    Attributes:
        path: a JSON, JSONL or Parquet file, or the folder of a saved `datasets` data set.
        name: of its loss curve, `loss/NAME`; sources of one name share one. Default: the file's, without ending.
        format: how a record is written; null is data.format.
        weight: how often each sample is seen in an epoch: 1 once, 2 twice, 0.5 in every other epoch.
        columns: our name of a column → its name in the file, where they differ.
    """

    path: Path
    name: Annotated[str, Field(pattern=r"^[^/\s]+$")]
    format: Format | None = None
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    columns: dict[Column, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            value = {"path": value}
        if (
            isinstance(value, Mapping)
            and value.get("name") is None
            and isinstance(value.get("path"), str | Path)
        ):
            return {**value, "name": "_".join(Path(value["path"]).stem.split())}
        return value


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str | Path | Mapping | SourceConfig) else value


class DataConfig(Section):
    """What is read, how it becomes tokens, and how tokens become packs.

    Attributes:
        train: what to learn from: one path or source, or a list of them.
        validation: name → path or source; each is evaluated on its own.
        format: how a record is written; `auto` looks at the first record of each file.
        chat_template: `tokenizer` for the model's own, the name of one of ours, or a jinja file.
        loss_on: `assistant` learns every assistant turn with the token that stops it, `last` only the last
            one, `all` every token that has something to be predicted from.
        tokens_per_pack: rows of every pack.
        too_long: what becomes of a sample longer than a pack.
        nothing_to_learn: what becomes of a sample without a token that has a loss.
        bad_record: what becomes of a record that cannot be read or rendered; those skipped are counted.
        cache_dir: where tokens are kept; one directory per content.
        workers: processes that tokenise; 0 is one for each core.
    """

    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
    validation: dict[str, SourceConfig] = Field(default_factory=dict)
    format: Format = "auto"
    chat_template: ChatTemplate
    loss_on: LossOn = "assistant"
    tokens_per_pack: Annotated[int, Field(gt=1, le=2**24)]
    too_long: Literal["drop", "truncate", "error"]
    nothing_to_learn: Literal["error", "skip"] = "error"
    bad_record: Literal["error", "skip"] = "error"
    cache_dir: Path
    workers: Annotated[int, Field(ge=0)] = 0

    @property
    def sets(self) -> dict[str, tuple[SourceConfig, ...]]:
        """Every set of samples: `train`, and `validation/NAME`."""
        return {
            "train": self.train,
            **{f"validation/{name}": (source,) for name, source in self.validation.items()},
        }

    @model_validator(mode="after")
    def _agree(self) -> DataConfig:
        if not any(source.weight for source in self.train):
            raise ValueError("every weight in data.train is 0, which leaves nothing to train on; raise one")
        for name, source in self.validation.items():
            if source.weight != 1:
                raise ValueError(
                    f"data.validation.{name} has weight {source.weight:g}; a validation set is seen once each "
                    "time, sample by sample; remove the weight"
                )
        return self
