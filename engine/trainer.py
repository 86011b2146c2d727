"""The loop: steps, evaluation, checkpoints, exports, in a straight line. Knows one model and one objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from paralign.models.errors import TrainingError

from .batch import StepBatch
from .checkpoint.native import NativeCheckpoints
from .checkpoint.store import Progress
from .columns import Filler
from .data.loader import PackLoader
from .generate import Generations
from .model import Model
from .objectives import Objective
from .observe.health import Health
from .observe.memory import Memory
from .observe.metrics import MetricsLog
from .observe.profiler import Profiler
from .observe.throughput import Throughput
from .optim import Optimizer
from .schedule import OptimizerConfig, learning_rate
from .step import UNITS, report, run_step


@dataclass(frozen=True)
class Cadence:
    """Steps between recurring things, None for never; see the recipe's sections."""

    log: int
    evaluate: int | None
    save: int | None
    export: int | None


@dataclass
class Trainer:
    """Everything that a run is made of, built by run.py.

    Attributes:
        model: prepared to train.
        train_loader, validation: packs to learn from, and by name those to be measured on.
        export: writes the model to a directory; collective.
        export_dir: where `export` puts `iter_0000100/` and, at the end, `final/`.
        fillers: by set (`train`, or a name in `validation`) what fills the columns of a step that no loader gives.
        generations: answers to be written at each evaluation, if any.
        total_steps: steps of the whole run, of which those before `first_step` are done.
    """

    model: Model
    objective: Objective
    optimizer: Optimizer
    schedule: OptimizerConfig
    train_loader: PackLoader
    validation: Mapping[str, PackLoader]
    checkpoints: NativeCheckpoints
    export: Callable[[Path], None]
    export_dir: Path
    cadence: Cadence
    log: MetricsLog
    health: Health
    on_nonfinite: Literal["stop", "skip"]
    throughput: Throughput
    memory: Memory
    profiler: Profiler
    first_step: int
    total_steps: int
    fillers: Mapping[str, Sequence[Filler]]
    count_tokens: bool
    generations: Generations | None = None

    def fit(self) -> bool:
        """Train to the last step, then evaluate, save and export.

        Returns:
            False if a signal asked to stop before the end; then the state is saved and nothing is exported.

        Raises:
            TrainingError: a gradient norm that is not finite, where that is to stop the run; the weights are
                those before that step, and saved.
        """
        measured: dict[str, float] = {}
        self.memory.start()
        for step in range(self.first_step, self.total_steps):
            if self.health.stop_agreed():
                self.save(step, measured)
                self.checkpoints.finish()
                return False
            if _due(self.cadence.evaluate, step):
                measured = self.evaluate(step)
            self.health.at("data", step)
            self.profiler.step_begins(step)
            batch = self.train_loader.step(step)
            values = self.train_step(step, batch)
            if self.profiler.is_last(step):
                go_on = self.throughput.pause()
                self.health.at("writing a trace", step)
                self.profiler.stop()
                go_on()
            if _due(self.cadence.log, step) or step + 1 == self.total_steps:
                if self.count_tokens:
                    values["num_tokens"] = float(self.train_loader.tokens_before(step + 1))
                self.log.log(step, values | self.throughput.read() | self.memory.read())
            self.checkpoints.poll()
            done = step + 1
            if done < self.total_steps:
                if _due(self.cadence.save, done):
                    self.save(done, measured)
                if _due(self.cadence.export, done):
                    self.write_weights(f"iter_{done:07d}")
        if self.cadence.evaluate:
            measured = self.evaluate(self.total_steps)
        if self.cadence.save and self.first_step < self.total_steps:
            self.save(self.total_steps, measured)
        self.checkpoints.finish()
        self.write_weights("final")
        return True

    def train_step(self, step: int, batch: StepBatch) -> dict[str, float]:
        """One update; its metrics."""
        lr = learning_rate(self.schedule, step, self.total_steps)
        self.optimizer.zero_grad()
        self.health.at("forward and backward", step)
        for filler in self.fillers["train"]:
            filler.fill(batch)
        marked = replace(batch, micro_batches=self.health.marking(batch.micro_batches))
        sums = run_step(self.model, marked, self.objective, train=True)
        self.health.at("optimizer", step)
        update = self.optimizer.step(lr)
        if not update.updated:
            self._refuse(step, batch, update.grad_norm)
        self.throughput.step_done(batch.n_tokens, self._flops(batch))
        return {
            **report(self.objective, sums),
            "grad_norm": update.grad_norm,
            "learning_rate": lr,
            "samples": float(batch.n_samples),
            **({} if update.updated else {"skipped": 1.0}),
        }

    def _refuse(self, step: int, batch: StepBatch, grad_norm: float) -> None:
        """What the recipe says of a step without a finite gradient norm: its weights stay as they were."""
        places = [self.train_loader.cache.place(i) for i in batch.sample_ids]
        message = (
            f"step {step}: the gradient norm is {grad_norm}; the weights stay as they were before it; its "
            f"{len(places)} samples: {', '.join(places[:8])}{', …' if len(places) > 8 else ''}"
        )
        self.log.note(step, message)
        if self.on_nonfinite == "stop":
            self.save(step, {})
            self.checkpoints.finish()
            raise TrainingError(message)

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics over every validation set, before step number `step`."""
        go_on = self.throughput.pause()
        self.health.at("evaluation", step)
        self.model.synchronize()
        values: dict[str, float] = {}
        for name, loader in self.validation.items():
            n_rows = len(UNITS) + len(self.objective.metrics)
            sums = torch.zeros(n_rows, 2, dtype=torch.float64, device=self.model.mesh.device)
            for batch in loader.evaluation():
                for filler in self.fillers[name]:
                    filler.fill(batch)
                sums += run_step(self.model, batch, self.objective, train=False)
            values |= {
                f"validation/{name}/{metric}": value for metric, value in report(self.objective, sums).items()
            }
        self.log.log(step, values)
        if self.generations is not None:
            self.generations.write(step)
        go_on()
        return values

    def save(self, done: int, measured: Mapping[str, float]) -> None:
        """Save the state after `done` steps."""
        go_on = self.throughput.pause()
        self.health.at("saving a checkpoint", done)
        self.checkpoints.save(Progress(done, self.train_loader.fingerprint, measured))
        go_on()

    def write_weights(self, name: str) -> None:
        """Export the model as it is."""
        go_on = self.throughput.pause()
        self.health.at(f"exporting {name}", self.total_steps)
        self.export(self.export_dir / name)
        go_on()

    def _flops(self, batch: StepBatch) -> float:
        """Forward and backward, over all ranks; what recompute adds does not count as work done."""
        ids = list(batch.sample_ids)
        lengths = self.train_loader.cache.lengths[ids]
        n_loss = int(self.train_loader.cache.n_loss[ids].sum())
        effective = float(np.square(lengths).sum()) / max(1, batch.n_tokens)
        arch = self.model.arch
        per_token = arch.linear_flops_per_token + arch.attention_flops_per_token(effective)
        return 3 * (batch.n_tokens * per_token + n_loss * arch.head_flops_per_token)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
