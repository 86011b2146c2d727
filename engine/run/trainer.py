"""The loop: steps, evaluation, checkpoints, exports, in a straight line. Knows one learner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from paralign.models.errors import TrainingError

from ..batch import StepBatch
from ..checkpoint.store import Progress
from ..columns.steps import Steps
from ..observe.spikes import Spikes
from ..observe.watch import Watch
from ..rollout.generate import Generations
from ..training.learner import Learner, training_flops
from ..training.soundness import copies_that_differ, refuse_not_finite, told
from ..training.state import NativeCheckpoints
from ..training.step import report


@dataclass(frozen=True)
class Course:
    """What happens when, as the recipe's sections say; steps between recurring things are None for never.

    Attributes:
        first_step: steps that are done already.
        total_steps: of the whole run.
        export_missing: the export that was due at `first_step` is not there: a kill came between save and export.
        on_nonfinite, on_spike: what is done about a gradient norm that is not finite, and about a spike.
        max_skipped: steps left out in a row that end the run.
        counts_tokens: whether `num_tokens` is among the metrics.
    """

    first_step: int
    total_steps: int
    log: int
    evaluate: int | None
    export: int | None
    export_missing: bool
    compare_copies: int | None
    on_nonfinite: Literal["stop", "skip"]
    on_spike: Literal["warn", "stop", "skip"]
    max_skipped: int
    counts_tokens: bool


@dataclass
class Trainer:
    """Everything that a run is made of.

    Attributes:
        train, validation: steps to learn from, and by name those to be measured on.
        export: writes the model under a name (`iter_0000100`, `final`); collective.
        generations: answers to be written at each evaluation, if any.
        spikes: tells losses and gradient norms that stand out, if the recipe watches them.
        skipped: steps left out since the last one that was not.
        told: what is said once and was.
    """

    learner: Learner
    train: Steps
    validation: Mapping[str, Steps]
    checkpoints: NativeCheckpoints
    export: Callable[[str], None]
    course: Course
    watch: Watch
    generations: Generations | None = None
    spikes: Spikes | None = None
    skipped: int = 0
    told: set[str] = field(default_factory=set)

    def fit(self) -> bool:
        """Train to the last step, then evaluate, save and export.

        Returns:
            False if a signal asked to stop before the end; then the state is saved and nothing is exported.

        Raises:
            TrainingError: a gradient norm that is not finite, or a spike, where that is to stop the run, or too many
                steps left out: the weights are those before that step, and saved. Weights that are not finite, or
                copies of one that differ: nothing is saved.
        """
        try:
            return self._to_the_end()
        except TrainingError:  # on all ranks alike
            self.checkpoints.finish()  # one that is being written is from before
            raise

    def _to_the_end(self) -> bool:
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
        """One update, or a step left out; its metrics."""
        learner, watch = self.learner, self.watch
        self._tell_of_one_prompt(step, batch)
        watch.at("forward and backward", step)
        marked = replace(batch, micro_batches=watch.marking(batch.micro_batches))
        values = learner.gradients(marked)
        if _due(self.course.compare_copies, step):
            watch.at("comparing copies of weights", step)
            self._compare_copies(step)
        watch.at("optimizer", step)
        values |= {
            "grad_norm": learner.gradient_norm(),
            "learning_rate": learner.learning_rate(step),
            "samples": float(batch.n_samples),
        }
        if self._accepts(step, batch, values):
            learner.update(step)
            return values
        return values | {"skipped": 1.0}

    def _accepts(self, step: int, batch: StepBatch, values: Mapping[str, float]) -> bool:
        """Whether the weights are to be updated; says what is wrong with a step, and ends the run where it is to."""
        action: str
        fault, action = None, self.course.on_nonfinite
        if not math.isfinite(values["grad_norm"]):
            fault = f"the gradient norm is {values['grad_norm']}"
        elif self.spikes is not None:
            fault, action = self.spikes.judge(values), self.course.on_spike
            if action != "warn" and self.learner.model.mesh.largest(fault is not None):
                fault = fault or "another rank sees a spike"  # all ranks must do the same
        if fault is None or action == "warn":
            if fault is not None:
                self.watch.log.note(step, f"step {step}: {fault}; {_samples(batch)}")
            if self.spikes is not None:
                self.spikes.accept(values)
            self.skipped = 0
            return True
        message = f"step {step}: {fault}; the weights stay as they were before it; {_samples(batch)}"
        self.watch.log.note(step, message)
        self._refuse_unsound(step)
        self.skipped += 1
        if action == "skip" and self.skipped < self.course.max_skipped:
            return False
        self.watch.log.log(step, {**values, "skipped": 1.0})  # for --replay-step to compare with
        self.save(step, {})
        if action == "skip":
            allowed = f"{self.skipped} steps in a row were skipped, as many as train.max_skipped_steps allows"
            message = f"{allowed}; the last was {message}"
        raise TrainingError(f"{message}; --replay-step {step} says where the fault is")

    def _refuse_unsound(self, step: int) -> None:
        remedy = (
            "nothing more is saved, and the newest checkpoint is from before; start the run again to go on from it, "
            f"and if it ends here again, --replay-step {min(step, self.course.total_steps - 1)} names the step"
        )
        refuse_not_finite(self.learner.model, f"step {step}", remedy, TrainingError)

    def _compare_copies(self, step: int) -> None:
        found = copies_that_differ(self.learner.model, self.learner.optimizer)
        if not found:
            return
        sure = max(0, step - (self.course.compare_copies or 0))
        message = (
            f"step {step}: copies of one weight differ: {told(found)}; memory, a link or a kernel has failed there; "
            f"nothing more is saved; remove checkpoints of more than {sure} steps, which may hold it already, leave "
            "the node out and start the run again"
        )
        self.watch.log.note(step, message)
        raise TrainingError(message)

    def _tell_of_one_prompt(self, step: int, batch: StepBatch) -> None:
        what = "one prompt"
        if self.train.loader.needs_mismatched and not batch.mismatched and what not in self.told:
            self.told.add(what)
            self.watch.log.note(
                step,
                f"step {step}: all its answers are to one prompt, and none is another prompt's; the baseline of such "
                "a step is 0; raise train.global_batch_size",
            )

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics over every validation set, before step number `step`."""
        values: dict[str, float] = {}
        with self.watch.aside("evaluation", step):
            self.learner.model.synchronize()
            for name, steps in self.validation.items():
                sums = sum(map(self.learner.measure, steps.evaluation()), self.learner.no_sums())
                measured = report(self.learner.objective, sums)
                values |= {f"validation/{name}/{metric}": value for metric, value in measured.items()}
            self.watch.log.log(step, values)
            if self.generations is not None:
                self.generations.write(step)
        return values

    def save(self, done: int, measured: Mapping[str, float]) -> None:
        """Save the state after `done` steps; not one with weights that are not finite."""
        window = self.spikes.window if self.spikes else ()
        with self.watch.aside("saving a checkpoint", done):
            self._refuse_unsound(done)
            self.checkpoints.save(Progress(done, self.train.fingerprint, measured, window=window))

    def write_weights(self, name: str) -> None:
        """Export the model as it is."""
        with self.watch.aside(f"exporting {name}", self.course.total_steps):
            self.export(name)


def _samples(batch: StepBatch) -> str:
    """Where the samples of a step were read; of many the first."""
    places = [batch.place(i) for i in batch.sample_ids]
    return f"its {len(places)} samples: {', '.join(places[:8])}{', …' if len(places) > 8 else ''}"


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
