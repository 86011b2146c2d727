"""TensorBoard and Weights & Biases as sinks of metrics. Imported by rank 0, and only where a recipe names them."""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from paralign.models.errors import RecipeError

from ..files.whole_file import write_whole
from .config import WandbConfig

RUN_ID = "run_id.txt"


class TensorBoard:
    """Event files in `run_dir/tensorboard`. Of a run that went further than the checkpoint it is resumed from,
    TensorBoard hides the steps that are done again.

    Args:
        recipe: the resolved recipe, YAML.
    """

    def __init__(self, run_dir: Path, first_step: int, recipe: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.place = run_dir / "tensorboard"
        self._writer = SummaryWriter(str(self.place), purge_step=first_step)
        self._recipe = recipe

    def start(self, facts: Mapping[str, str]) -> None:
        self._writer.add_text("facts", "\n".join(f"- **{name}**: {value}" for name, value in facts.items()))
        self._writer.add_text("recipe", f"```yaml\n{self._recipe}```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def note(self, step: int, text: str) -> None:
        self._writer.add_text("notes", text, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; its files lie in `run_dir/wandb`, its id in `run_dir/wandb/run_id.txt`.

    Curves are drawn over `step`, our own: W&B's counter only goes up, and would drop what a resumed run writes
    again.

    Raises:
        RecipeError: W&B refuses the run, as without a login.
    """

    def __init__(self, config: WandbConfig, run_dir: Path, recipe: str) -> None:
        import wandb

        run_dir = run_dir.absolute()
        self.place = run_dir / "wandb"
        self.place.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or run_dir.name,
                id=_run_id(self.place / RUN_ID),
                resume="allow",
                mode=config.mode,
                dir=run_dir,
                config=yaml.safe_load(recipe),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise RecipeError(
                f"observe.wandb: {str(error).rstrip('.')}; run `wandb login`, or set observe.wandb.mode: offline and "
                f"`wandb sync` {self.place}/offline-run-* later"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def start(self, facts: Mapping[str, str]) -> None:
        self._run.config.update({"facts": dict(facts)}, allow_val_change=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def note(self, step: int, text: str) -> None:
        self._run.alert(title=f"step {step}", text=text)

    def close(self) -> None:
        closed_by_an_error = sys.exc_info()[0] is not None
        self._run.finish(exit_code=int(closed_by_an_error))


def _run_id(path: Path) -> str:
    """The one that the file holds; a new one where there is none, or a power cut took its bytes."""
    kept = path.read_bytes().strip() if path.exists() else b""
    if not re.fullmatch(rb"[0-9A-Za-z_-]{1,64}", kept):
        kept = uuid.uuid4().hex[:12].encode()
        write_whole(path, kept)
    return kept.decode()
