"""The loop: steps, evaluation, checkpoints, exports, each when the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NoReturn

from paralign.models.errors import TrainingError

from ..batch import StepBatch
from ..checkpoint.store import Progress
from ..columns.steps import Steps
from ..observe.watch import Watch
from ..rollout.generate import Generations
from ..training.learner import Learner, training_flops
from ..training.soundness import copies_that_differ, not_finite, told
from ..training.state import NativeCheckpoints
from ..training.step import report
from .judge import Judge


@dataclass(frozen=True)
class Course:
    """What happens when, as the recipe's sections say; steps between recurring things are None for never.

    Attributes:
        first_step: steps that are done already.
        total_steps: of the whole run.
        export_missing: the export that was due at `first_step` is not there: a kill came between save and export.
        counts_tokens: whether `num_tokens` is among the metrics.
    """

    first_step: int
    total_steps: int
    log: int
    evaluate: int | None
    export: int | None
    export_missing: bool
    compare_copies: int | None
    counts_tokens: bool


@dataclass
class Trainer:
    """Everything that a run is made of.

    Attributes:
        train, validation: steps to learn from, and by name those to be measured on.
        export: writes the model under a name (`iter_0000100`, `final`); collective.
        judge: says which steps are taken into the weights.
        generations: answers to be written at each evaluation, if any.
    """

    learner: Learner
    train: Steps
    validation: Mapping[str, Steps]
    checkpoints: NativeCheckpoints
    export: Callable[[str], None]
    course: Course
    watch: Watch
    judge: Judge
    generations: Generations | None = None

    def fit(self) -> bool:
        """Train to the last step, then evaluate, save and export.

        Returns:
            False if a signal asked to stop before the end; then the state is saved and nothing is exported.

        Raises:
            TrainingError: a gradient norm that is not finite, or a spike, where that is to stop the run, or too many
                steps left out: the weights are those before that step, and saved. Weights that are not finite, or
                copies of one that differ: nothing is saved.
        """
        course, measured = self.course, dict[str, float]()
        if course.export_missing:
            self.write_weights(f"iter_{course.first_step:07d}", course.first_step)
        steps = range(course.first_step, course.total_steps)
        with closing(self.train.in_turn(steps)) as batches:
            for step in steps:
                if self.watch.stop_agreed():
                    self.save(step, measured, last=True)
                    self.checkpoints.finish()
                    return False
                if _due(course.evaluate, step):
                    measured = self.evaluate(step)
                self.watch.step_begins(step)
                batch = next(batches)
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
                        self.write_weights(f"iter_{done:07d}", done)
        if course.evaluate:
            measured = self.evaluate(course.total_steps)
        if self.checkpoints.saves and course.first_step < course.total_steps:
            self.save(course.total_steps, measured, last=True)
        self.checkpoints.finish()
        self.write_weights("final", course.total_steps)
        return True

    def train_step(self, step: int, batch: StepBatch) -> dict[str, float]:
        """One update, or a step left out; its metrics."""
        learner, watch = self.learner, self.watch
        self._tell_of_one_prompt(step, batch)
        watch.at("forward and backward", step)
        values = learner.gradients(self._marked(batch))
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

    def _marked(self, batch: StepBatch) -> StepBatch:
        """The same; its packs say to the watch where this rank is."""
        return replace(batch, micro_batches=self.watch.marking(batch.micro_batches))

    def _accepts(self, step: int, batch: StepBatch, values: Mapping[str, float]) -> bool:
        """Whether the weights are to be updated; says what is wrong with a step, and ends the run where it is to."""
        verdict = self.judge(values)
        if not verdict.fault:
            return True
        log, samples = self.watch.log, _samples(batch)
        if verdict.action == "warn":
            log.note(step, f"step {step}: {verdict.fault}; {samples}")
            return True
        message = f"step {step}: {verdict.fault}; the weights stay as they were before it; {samples}"
        log.note(step, message)
        self._refuse_unsound(step)
        if verdict.action == "skip":
            return False
        log.log(step, {**values, "skipped": 1.0})  # for --replay-step to compare with
        self.save(step, {}, last=True)
        self._end(f"{message}; {verdict.why_stop}--replay-step {step} says where the fault is")

    def _end(self, message: str) -> NoReturn:
        """End the run with an error that all ranks have found; what is still being written is from before it."""
        self.checkpoints.finish()
        self.learner.model.mesh.barrier()  # the first to leave has the others ended, and rank 0 has to write it down
        raise TrainingError(message)

    def _refuse_unsound(self, step: int) -> None:
        if found := not_finite(self.learner.model):
            self._end(
                f"step {step}: weights are not finite: {told(found)}; nothing more is saved, and the newest "
                "checkpoint is from before; start the run again to go on from it, and if it ends here again, "
                f"--replay-step {min(step, self.course.total_steps - 1)} names the step"
            )

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
        self._end(message)

    def _tell_of_one_prompt(self, step: int, batch: StepBatch) -> None:
        if self.train.loader.needs_mismatched and not batch.mismatched:
            self.watch.log.note_once(
                "one prompt",
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
                marked = map(self._marked, steps.evaluation())
                sums = sum(map(self.learner.measure, marked), self.learner.no_sums())
                measured = report(self.learner.objective, sums)
                values |= {f"validation/{name}/{metric}": value for metric, value in measured.items()}
            self.watch.log.log(step, values)
            if self.generations is not None:
                self.generations.write(step)
        return values

    def save(self, done: int, measured: Mapping[str, float], *, last: bool = False) -> None:
        """Save the state after `done` steps, the `last` of this run; not one with weights that are not finite."""
        with self.watch.aside("saving a checkpoint", done):
            self._refuse_unsound(done)
            progress = Progress(done, self.train.fingerprint, measured, window=self.judge.window)
            self.checkpoints.save(progress, self.watch.moved, last=last)

    def write_weights(self, name: str, done: int) -> None:
        """Export the model as it is after `done` steps; not one with weights that are not finite."""
        with self.watch.aside(f"exporting {name}", done):
            self._refuse_unsound(done)
            self.export(name)


def _samples(batch: StepBatch) -> str:
    """Where the samples of a step were read; of many the first."""
    places = [batch.place(i) for i in batch.sample_ids]
    return f"its {len(places)} samples: {', '.join(places[:8])}{', …' if len(places) > 8 else ''}"


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
