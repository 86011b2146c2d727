"""The loop: steps, evaluation, checkpoints, exports, each when the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from paralign.models.errors import TrainingError

from ..batch import StepBatch
from ..checkpoint.store import Progress
from ..columns.steps import Steps
from ..observe.watch import Watch
from ..rollout.generate import Generations
from ..training.learner import Learner, training_flops
from ..training.state import NativeCheckpoints
from ..training.step import report


@dataclass(frozen=True)
class Course:
    """What happens when, as the recipe's sections say; steps between recurring things are None for never.

    Attributes:
        first_step: steps that are done already.
        total_steps: of the whole run.
        export_missing: the export that was due at `first_step` is not there: a kill came between save and export.
        on_nonfinite: what is done about a gradient norm that is not finite.
        counts_tokens: whether `num_tokens` is among the metrics.
    """

    first_step: int
    total_steps: int
    log: int
    evaluate: int | None
    export: int | None
    export_missing: bool
    on_nonfinite: Literal["stop", "skip"]
    counts_tokens: bool


@dataclass
class Trainer:
    """Everything that a run is made of.

    Attributes:
        train, validation: steps to learn from, and by name those to be measured on.
        export: writes the model under a name (`iter_0000100`, `final`); collective.
        generations: answers to be written at each evaluation, if any.
    """

    learner: Learner
    train: Steps
    validation: Mapping[str, Steps]
    checkpoints: NativeCheckpoints
    export: Callable[[str], None]
    course: Course
    watch: Watch
    generations: Generations | None = None

    def fit(self) -> bool:
        """Train to the last step, then evaluate, save and export.

        Returns:
            False if a signal asked to stop before the end; then the state is saved and nothing is exported.

        Raises:
            TrainingError: a gradient norm that is not finite, where that is to stop the run; the weights are
                those before that step, and saved.
        """
        course, measured = self.course, dict[str, float]()
        if course.export_missing:
            self.write_weights(f"iter_{course.first_step:07d}")
        for step in range(course.first_step, course.total_steps):
            if self.watch.stop_agreed():
                self.save(step, measured)
                self.checkpoints.finish()
                return False
            if _due(course.evaluate, step):
                measured = self.evaluate(step)
            self.watch.step_begins(step)
            batch = self.train.step(step)
            values = self.train_step(step, batch)
            flops = training_flops(self.learner.model.arch, batch)
            self.watch.step_done(step, n_tokens=batch.n_tokens, flops=flops)
            if _due(course.log, step) or step + 1 == course.total_steps:
                if course.counts_tokens:
                    values["num_tokens"] = float(self.train.loader.tokens_before(step + 1))
                self.watch.report(step, values)
            self.checkpoints.poll()
            done = step + 1
            if done < course.total_steps:
                if self.checkpoints.due(done):
                    self.save(done, measured)
                if _due(course.export, done):
                    self.write_weights(f"iter_{done:07d}")
        if course.evaluate:
            measured = self.evaluate(course.total_steps)
        if self.checkpoints.saves and course.first_step < course.total_steps:
            self.save(course.total_steps, measured)
        self.checkpoints.finish()
        self.write_weights("final")
        return True

    def train_step(self, step: int, batch: StepBatch) -> dict[str, float]:
        """One update; its metrics."""
        self.watch.at("forward and backward", step)
        measured = self.learner.gradients(self._marked(batch))
        self.watch.at("optimizer", step)
        update = self.learner.update(step)
        if not update.updated:
            self._refuse(step, batch, update.grad_norm)
        return {
            **measured,
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            "samples": float(batch.n_samples),
            **({} if update.updated else {"skipped": 1.0}),
        }

    def _marked(self, batch: StepBatch) -> StepBatch:
        """The same; its packs say to the watch where this rank is."""
        return replace(batch, micro_batches=self.watch.marking(batch.micro_batches))

    def _refuse(self, step: int, batch: StepBatch, grad_norm: float) -> None:
        """What the recipe says of a step without a finite gradient norm: its weights stay as they were."""
        places = [batch.place(i) for i in batch.sample_ids]
        message = (
            f"step {step}: the gradient norm is {grad_norm}; the weights stay as they were before it; its "
            f"{len(places)} samples: {', '.join(places[:8])}{', …' if len(places) > 8 else ''}"
        )
        self.watch.log.note(step, message)
        if self.course.on_nonfinite == "stop":
            self.save(step, {})
            self.checkpoints.finish()
            raise TrainingError(message)

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics over every validation set, before step number `step`."""
        values: dict[str, float] = {}
        with self.watch.aside("evaluation", step):
            self.learner.model.synchronize()
            for name, steps in self.validation.items():
                marked = map(self._marked, steps.evaluation())
                sums = sum(map(self.learner.measure, marked), self.learner.no_sums())
                measured = report(self.learner.objective, sums)
                values |= {f"validation/{name}/{metric}": value for metric, value in measured.items()}
            self.watch.log.log(step, values)
            if self.generations is not None:
                self.generations.write(step)
        return values

    def save(self, done: int, measured: Mapping[str, float]) -> None:
        """Save the state after `done` steps."""
        with self.watch.aside("saving a checkpoint", done):
            self.checkpoints.save(Progress(done, self.train.fingerprint, measured))

    def write_weights(self, name: str) -> None:
        """Export the model as it is."""
        with self.watch.aside(f"exporting {name}", self.course.total_steps):
            self.export(name)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
