"""The `data:` section of a recipe. Owns its keys and their ranges, not what is done with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ..config import Section

Format = Literal["auto", "messages", "alpaca"]
LossOn = Literal["assistant", "last", "all"]
ChatTemplate = Literal["tokenizer", "llama3", "chatml"] | Path


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str | Path) else value


class DataConfig(Section):
    """What is read, how it becomes tokens, and how tokens become packs.

    Attributes:
        train: files of conversations, JSON or JSONL; a recipe may give one path or a list.
        validation: name → file; each is evaluated on its own.
        format: how a record is written; `auto` looks at the first record of each file.
        chat_template: `tokenizer` for the model's own, the name of one of ours, or a jinja file.
        loss_on: `assistant` learns every assistant turn with the token that stops it, `last` only the last
            one, `all` every token that has something to be predicted from.
        tokens_per_pack: rows of every pack.
        too_long: what becomes of a sample longer than a pack.
        nothing_to_learn: what becomes of a sample without a token that has a loss.
        cache_dir: where tokens are kept; one directory per content.
        workers: processes that tokenise; 0 is one for each core.
    """

    train: Annotated[tuple[Path, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
    validation: dict[str, Path] = Field(default_factory=dict)
    format: Format = "auto"
    chat_template: ChatTemplate
    loss_on: LossOn = "assistant"
    tokens_per_pack: Annotated[int, Field(gt=1)]
    too_long: Literal["drop", "truncate", "error"]
    nothing_to_learn: Literal["error", "skip"] = "error"
    cache_dir: Path
    workers: Annotated[int, Field(ge=0)] = 0
