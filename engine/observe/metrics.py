"""Sends the metrics of a run to metrics.jsonl, the console and the trackers, while it runs.

Names: loss, loss/SOURCE where there are several, grad_norm, learning_rate, tokens_per_second (all GPUs),
tflops_per_gpu, mfu, peak_memory_gb and peak_reserved_memory_gb (of the fullest rank), samples, validation/NAME/loss.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from paralign.models.errors import ParalignError, TrainingError

from ..files.json_lines import StepLines, read_lines
from ..files.refused import refusal
from .config import ObserveConfig

METRICS = "metrics.jsonl"
_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "grad_norm": lambda value: f"grad_norm {value:.3f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "samples": lambda value: f"samples {value:.0f}",
    "num_tokens": lambda value: f"num_tokens {value:,.0f}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "tflops_per_gpu": lambda value: f"{value:.3g} TFLOP/s/GPU",
    "mfu": lambda value: f"MFU {value:.1%}",
    "peak_memory_gb": lambda value: f"{value:.1f} GB",
    "slow_rank": lambda value: f"slow: rank {value:.0f}",
    "slow_rank_ratio": lambda value: f"at {value:.1f}×",
}


class Sink(Protocol):
    """Somewhere that metrics go; `place` is where, as errors name it."""

    place: Path

    def start(self, facts: Mapping[str, str]) -> None: ...
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def note(self, step: int, text: str) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Sends metrics to its sinks; a rank without sinks logs nothing.

    Raises:
        TrainingError: a sink cannot be written, as on a full disk.
    """

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks
        self._noted: set[str] = set()

    @classmethod
    def for_rank(
        cls,
        rank: int,
        run_dir: Path,
        *,
        first_step: int,
        total_steps: int,
        config: ObserveConfig,
        recipe: str,
    ) -> MetricsLog:
        """Rank 0 writes metrics.jsonl, the console and what the recipe names besides; the others nothing.

        Args:
            recipe: the resolved recipe, YAML.
        """
        if rank != 0:
            return cls()
        with _naming(run_dir):
            sinks: list[Sink] = [JsonLines(run_dir, first_step), ConsoleLog(first_step, total_steps)]
            if config.tensorboard or config.wandb:
                from .trackers import TensorBoard, WeightsAndBiases

                if config.tensorboard:
                    sinks.append(TensorBoard(run_dir, first_step, recipe))
                if config.wandb:
                    sinks.append(WeightsAndBiases(config.wandb, run_dir, recipe))
        return cls(*sinks)

    def start(self, facts: Mapping[str, str]) -> None:
        """Shows what is about to run."""
        for sink in self._sinks:
            with _naming(sink.place):
                sink.start(facts)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Reports values of a step, counted from 0."""
        for sink in self._sinks:
            with _naming(sink.place):
                sink.log(step, values)

    def note(self, step: int, text: str) -> None:
        """Reports something that happened at a step, in words."""
        for sink in self._sinks:
            with _naming(sink.place):
                sink.note(step, text)

    def note_once(self, what: str, step: int, text: str) -> None:
        """`note`, unless something under this name was noted before."""
        if what not in self._noted:
            self._noted.add(what)
            self.note(step, text)

    def close(self) -> None:
        for sink in self._sinks:
            with _naming(sink.place):
                sink.close()


@contextmanager
def _naming(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as refused:
        raise TrainingError(
            f"{refusal(refused, place)}; checkpoints stay as they are, and a run goes on from the newest"
        ) from refused


class JsonLines:
    """`run_dir/metrics.jsonl`: a line {"step", "time", metrics…} for each report; time in seconds since 1970.

    Lines of `first_step` and later are cut when it opens: a resumed run is going to write them again. Lines that are
    not of a run go to metrics.jsonl.unread.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self.place = run_dir / METRICS
        self._lines = StepLines(self.place, first_step)

    def start(self, facts: Mapping[str, str]) -> None:
        """Facts stand in the recipe kept beside this file."""
        del facts
        if numbers := self._lines.unread:
            some = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
            what = "line" if len(numbers) == 1 else "lines"
            print(
                f"{self.place}: {what} {some}: torn, or not of a run; moved to {METRICS}.unread",
                file=sys.stderr,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write({"step": step, "time": round(time.time(), 3), **finite})

    def note(self, step: int, text: str) -> None:
        self._lines.write({"step": step, "time": round(time.time(), 3), "note": text})

    def close(self) -> None:
        self._lines.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; what is torn or no such line is left out. Raises ParalignError."""
    path = run_dir / METRICS
    try:
        return [line.values for line in read_lines(path) if line.values is not None]
    except OSError as error:
        raise ParalignError(f"{path}: {error.strerror}; expected the directory of a run") from None


def logged_step(run_dir: Path, step: int) -> dict[str, float | None] | None:
    """What a run logged of a training step, the last time that it was done; None if nothing."""
    if not (run_dir / "metrics.jsonl").exists():
        return None
    lines = [line for line in read_metrics(run_dir) if line["step"] == step and "grad_norm" in line]
    return lines[-1] if lines else None


class ConsoleLog:
    """A live bar on a terminal; elsewhere, one plain line for each report."""

    place = Path("the terminal")

    def __init__(self, first_step: int, total_steps: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._total_steps = total_steps
        self._began: tuple[int, float] | None = None
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, values="")

    def start(self, facts: Mapping[str, str]) -> None:
        self._console.print(facts_block("paralign", facts))
        self._bar.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        validation = [
            f"{name} {value:.4f}"
            for name, value in values.items()
            if name not in _SHOWN and not name.startswith("loss/")
        ]
        training = [show(values[name]) for name, show in _SHOWN.items() if name in values]
        if not self._console.is_terminal:
            self._print(f"step {step}/{self._total_steps}", *training, *validation, *self._time_left(step))
            return
        if validation:
            self._print(f"step {step}", *validation)
        if training:
            self._bar.update(self._task, completed=step + 1, values="  ".join(training))

    def note(self, step: int, text: str) -> None:
        del step  # the text names it
        self._print(text)

    def close(self) -> None:
        self._bar.stop()

    def _print(self, *parts: str) -> None:
        self._console.print("  ".join(parts), markup=False, soft_wrap=True)

    def _time_left(self, step: int) -> list[str]:
        """From the second report on: the first step is no measure."""
        now, steps_left = time.monotonic(), self._total_steps - step - 1
        if self._began is None:
            self._began = (step, now)
        if step <= self._began[0] or steps_left <= 0:
            return []
        seconds = (now - self._began[1]) / (step - self._began[0]) * steps_left
        return [f"ETA {int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"]


def facts_block(title: str, facts: Mapping[str, str]) -> Panel:
    """Names and values, one below the other in a frame."""
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(Text(name), Text(value))  # Text: a name in brackets is no markup
    return Panel(grid, title=title, title_align="left", expand=False)
