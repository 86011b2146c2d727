"""Reruns one step, and reports what caused its loss or gradient: a weight, a pack and a sample, or neither.

Nothing is written but the report.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..batch import PackedBatch, StepBatch
from ..parallel.mesh import Mesh
from ..training.learner import Learner
from ..training.model import Model
from ..training.soundness import not_finite, told
from ..training.step import UNITS, run_own
from .trainer import Trainer


@dataclass(frozen=True)
class PackReport:
    """A pack, or one sample of it, by itself, with the weights before the step.

    Attributes:
        dp_rank, micro_batch: whose pack it was, and which.
        loss: its share of the step's loss: those of all packs add up to it.
        largest_gradient: greatest absolute entry of its gradient on any rank, NaN if any is not finite. What several
            ranks add to one weight, such as a norm's under sequence parallelism, is not added up.
        parameter: where that entry is; of those not finite, the nearest to the head, where the backward pass met
            it first.
        samples: `file:line` of each.
    """

    dp_rank: int
    micro_batch: int
    loss: float
    largest_gradient: float
    parameter: str
    samples: tuple[str, ...]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.largest_gradient)


@dataclass(frozen=True)
class Replay:
    """What a step did, and what each of its packs does alone.

    Attributes:
        loss, grad_norm: of the whole step; NaN where a weight was not finite before it.
        packs: those of all data-parallel ranks.
        samples: of packs that are not finite, each sample by itself.
        weights: those that were not finite before it, in words; then nothing else was tried.
        weights_at: the step before which they were found so.
    """

    step: int
    loss: float
    grad_norm: float
    packs: tuple[PackReport, ...]
    samples: tuple[PackReport, ...]
    weights: tuple[str, ...] = ()
    weights_at: int = 0


def replay(trainer: Trainer, step: int) -> Replay:
    """Train up to `step` without a trace, then look at that step. Collective; equal on all ranks."""
    course = trainer.course
    # What ended the run is to be seen again, not to end this.
    trainer = replace(trainer, judge=trainer.judge.lenient())
    learner = trainer.learner
    mesh = learner.model.mesh
    bad, done = not_finite(learner.model), course.first_step
    while not bad and done < step:
        trainer.train_step(done, trainer.train.step(done))
        bad, done = not_finite(learner.model), done + 1
    if bad:
        return Replay(step, math.nan, math.nan, (), (), tuple(bad), done)
    learner.model.synchronize()
    batch = trainer.train.step(step)
    mine = [
        _alone(learner, batch, pack, k, batch.pack_samples[k]) for k, pack in enumerate(batch.micro_batches)
    ]
    packs = _gather(mesh, mine)
    samples: list[PackReport] = []
    for k in [pack.micro_batch for pack in packs if not pack.finite and pack.dp_rank == mesh.dp.rank]:
        for id_ in batch.pack_samples[k]:
            pack = trainer.train.alone([id_], batch, k, times=mesh.layout.micro_batch_multiple)
            samples.append(_alone(learner, batch, pack, k, [id_]))
    found = _gather(mesh, samples)
    loss = learner.gradients(batch)["loss"]
    return Replay(step, loss, learner.gradient_norm(), tuple(packs), tuple(found))


def _alone(
    learner: Learner, batch: StepBatch, pack: PackedBatch, micro_batch: int, ids: Sequence[int]
) -> PackReport:
    """What this pipeline stage and tensor-parallel rank sees of a pack that is the whole step."""
    mesh = learner.model.mesh
    times = mesh.layout.micro_batch_multiple  # an interleaved schedule wants as many
    learner.optimizer.zero_grad()
    with _local_gradients(learner.model):
        alone = replace(batch, micro_batches=[pack] * times)
        sums = run_own(learner.model, alone, learner.objective, train=True)
    loss = sum(
        total / (batch.counts.get(unit, 0) or 1.0)
        for unit, total in zip(UNITS, sums[: len(UNITS), 0].tolist())
    )
    named = list(learner.model.named_weights())
    entries = torch.stack(
        [torch.linalg.vector_norm(weight.main_grad, math.inf) for _, weight in named]
    ).tolist()
    largest, parameter = max(
        (
            (entry / times if math.isfinite(entry) else math.nan, name)
            for entry, (name, _) in zip(entries, named)
        ),
        key=_severity,
    )
    places = tuple(map(batch.place, ids))
    return PackReport(mesh.dp.rank, micro_batch, loss / times, largest, parameter, places)


def _severity(found: tuple[float, str]) -> tuple[bool, float]:
    """Of gradients that are not finite the one nearest the head comes first: it spoilt those before it."""
    largest, name = found
    if not math.isnan(largest):
        return False, largest
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    return True, float(layer[1]) if layer else -1.0 if name.startswith("embedding.") else math.inf


@contextmanager
def _local_gradients(model: Model) -> Iterator[None]:
    """Gradients stay where they are computed: no reduction over data-parallel ranks or shared weights."""
    config = model.config
    before = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func = config.no_sync_func = None
    try:
        with ExitStack() as stack:
            for chunk in model.chunks:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = before


def _gather(mesh: Mesh, mine: Sequence[PackReport]) -> list[PackReport]:
    """The reports of all ranks, those of one pack's stages and tensor-parallel shares made one.

    The loss is the last stage's, the same on its tensor-parallel ranks, and zero on the other stages.
    """
    counts_loss = mesh.is_last_stage and mesh.tp.rank == 0
    every = mesh.gather([(counts_loss, part) for part in mine])
    merged: dict[tuple[int, int, tuple[str, ...]], PackReport] = {}
    for counts_loss, part in (entry for rank in every for entry in rank):
        key = (part.dp_rank, part.micro_batch, part.samples)
        part = part if counts_loss else replace(part, loss=0.0)
        known = merged.get(key)
        if known is None:
            merged[key] = part
            continue
        worse = max(known, part, key=lambda one: _severity((one.largest_gradient, one.parameter)))
        merged[key] = replace(worse, loss=known.loss + part.loss)
    return [merged[key] for key in sorted(merged)]


def verdict(found: Replay, logged: Mapping[str, float | None] | None) -> str:
    """Where the fault of a step is: in a weight, in a sample, in neither, or that it came only once.

    Args:
        logged: what the run wrote of this step, null for numbers that were not finite; None if it wrote nothing.
    """
    if found.weights:
        when = f"before step {found.weights_at}"
        return (
            f"the fault is in a weight, not in a sample: {when} these are not finite: {told(found.weights)}"
        )
    bad = [sample for sample in found.samples if not sample.finite]
    packs = [pack for pack in found.packs if not pack.finite]
    if bad:
        return f"the fault is in a sample: {', '.join(place for sample in bad for place in sample.samples)}"
    if packs:
        return f"{len(packs)} packs are not finite, and none of their samples is so alone: what they add up to is"
    again = {"loss": found.loss, "grad_norm": found.grad_norm}
    if not all(map(math.isfinite, again.values())):
        return "every pack is finite alone, and the sum of their gradients is not: it is too large"
    every = "every pack and every weight is finite"
    if logged is None or not again.keys() <= logged.keys():
        return f"{every}; the run logged nothing of this step that this could be held against"
    shown = ", ".join(f"{name} {'not finite' if logged[name] is None else logged[name]}" for name in again)
    if again == {name: logged[name] for name in again}:
        return f"{every}, and the step is what was logged, to the bit: whatever is odd in it comes each time"
    before = [logged[name] for name in again]
    if all(
        one is not None and math.isclose(one, now, rel_tol=1e-2) for one, now in zip(before, again.values())
    ):
        return f"{every}, and the step is what was logged, {shown}, but for rounding"
    return (
        f"the fault came only once: logged were {shown}, and the same step again is finite and another; "
        "that is memory, a link or a kernel that fails now and then: try other nodes"
    )


def show(found: Replay, logged: Mapping[str, float | None] | None, path: Path, console: Console) -> None:
    """Write the report to `path` as JSON, and what it says to the console; see `verdict`."""
    conclusion = verdict(found, logged)
    report = {**asdict(found), "verdict": conclusion}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if not found.weights:
        console.print(f"step {found.step}: loss {found.loss:.6g}, grad_norm {found.grad_norm:.6g}")
        table = Table(
            *("dp rank", "micro-batch", "share of the loss", "largest gradient", "parameter", "samples"),
            box=None,
        )
        for pack in found.packs:
            table.add_row(*_cells(pack), f"{len(pack.samples)}")
        for sample in found.samples:
            if not sample.finite:
                table.add_row(*_cells(sample), *sample.samples, style="red")
        console.print(table)
    console.print(conclusion, markup=False)
    console.print(f"all samples: {path}")


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(pack: PackReport) -> tuple[str, ...]:
    return (
        str(pack.dp_rank),
        str(pack.micro_batch),
        f"{pack.loss:.6g}",
        f"{pack.largest_gradient:.6g}",
        pack.parameter,
    )
