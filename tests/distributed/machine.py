"""Trains a toy for real on the ranks of this machine, GPUs where there are any: layouts, a kill, a resume.

    python -m tests.distributed.machine [--ranks 8] [--output machine.json]

- **Layouts.** Every layout of the certificate that takes so many ranks, in fp32 and in bf16, by `paralign train`.
  Each is held against one rank in fp32: in fp32 within the bound of the certificate, in bf16 within three times what
  one rank is off in bf16.
- **A kill.** kill −9 of the last rank, after a save; nothing may be left. The run goes on from its checkpoint: at the
  same layout to the bit (`model.deterministic`), at another one within the bound.

Prints a line for each run and writes JSON after each, with the seconds from the command to the end of the first step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from paralign.engine.observe.metrics import read_metrics

from .covering import LAYOUT
from .processes import Processes
from .toy import losses_of, make_toy, write_recipe

BOUND = 1e-5  # relative, of the losses of all steps: the certificate's of a loss after updates
STEPS = 6
STEPS_OF_A_KILLED_RUN = 16
Keys = Mapping[str, Any]
Losses = Mapping[int, float]


def layouts(ranks: int) -> dict[str, Keys]:
    """Keys of `layout:` by name, for all layouts of so many ranks; the toy has too few layers for uneven stages."""
    found = {}
    for tensor, pipeline in product(LAYOUT["tensor"], LAYOUT["pipeline"]):
        keys = LAYOUT["tensor"][tensor] | LAYOUT["pipeline"][pipeline]
        model = keys.get("tensor_model_parallel_size", 1) * keys.get("pipeline_model_parallel_size", 1)
        if pipeline != "PP4 uneven" and ranks % model == 0:
            overlap = "overlap" if ranks > model else ""
            found[f"{tensor}×{pipeline}×DP{ranks // model}"] = keys | LAYOUT["overlap"][overlap]
    return found


class Machine:
    """Runs of one toy in a directory; `found` is what came of them."""

    def __init__(self, directory: Path, ranks: int, output: Path) -> None:
        self._directory = directory
        self._ranks = ranks
        self._output = output
        note = "" if torch.cuda.is_available() else "no GPU at hand: gloo on the CPU; no figure here counts"
        self.found: dict[str, Any] = {"note": note, "ranks": ranks, "runs": []}
        make_toy(directory)

    def passes(self) -> bool:
        """Run everything, past what fails; whether all is as it must be."""
        exact, _ = self._train("one", {}, "fp32", ranks=1)
        off = self._hold("one rank, bf16", lambda: self._train("one", {}, "bf16", ranks=1), exact, None)
        for (name, keys), (dtype, bound) in product(
            layouts(self._ranks).items(), {"fp32": BOUND, "bf16": 3 * off}.items()
        ):
            train = partial(self._train, name, keys, dtype, ranks=self._ranks)
            self._hold(f"{name}, {dtype}", train, exact, bound)
        self._kill_and_resume()
        return all(run["passed"] for run in self.found["runs"])

    def _kill_and_resume(self) -> None:
        every = layouts(self._ranks)
        name, other = next(iter(every)), list(every)[-1]
        steps = STEPS_OF_A_KILLED_RUN
        whole, _ = self._train("whole", every[name], "fp32", ranks=self._ranks, steps=steps)

        def killed(again: str) -> tuple[Losses, float]:
            run = f"killed, on at {again}"
            self._kill(run, every[name])
            return self._train(run, every[again], "fp32", ranks=self._ranks, steps=steps)

        for again, bound in ((name, 0.0), (other, BOUND)):
            self._hold(f"{name}, killed, on at {again}", partial(killed, again), whole, bound)

    def _kill(self, name: str, keys: Keys) -> None:
        """Start a run and kill its last rank after a save."""
        recipe = self._recipe(name, keys, "fp32", STEPS_OF_A_KILLED_RUN)
        with Processes(self._directory / "log") as processes:
            process = processes.start(_command(recipe, self._ranks))
            processes.wait_until(lambda: bool(losses_of(self._directory / name)))
            victim = processes.ranks()[self._ranks - 1]
            processes.wait_until(lambda: len(losses_of(self._directory / name)) > 5, pause=0.001)
            os.kill(victim, signal.SIGKILL)
            assert process.wait(60) != 0, "the kill came too late"
            assert not (left := processes.left()), f"left running: {left}"

    def _recipe(self, name: str, keys: Keys, dtype: str, steps: int) -> Path:
        return write_recipe(
            self._directory,
            name,
            dict(keys),
            model__dtype=dtype,
            model__deterministic=True,
            train__max_steps=steps,
            train__eval_every_steps=None,
            checkpoint__save_every_steps=4,
        )

    def _train(
        self, name: str, keys: Keys, dtype: str, *, ranks: int, steps: int = STEPS
    ) -> tuple[Losses, float]:
        """Losses by step, and seconds from the command to the end of its first step; one that was killed goes on."""
        run_dir = self._directory / (name if steps != STEPS else f"{name}, {dtype}")
        recipe = self._recipe(run_dir.name, keys, dtype, steps)
        with Processes(self._directory / "log") as processes:
            began = time.time()
            code = processes.start(_command(recipe, ranks)).wait(300)
        assert code == 0, f"exit code {code}:\n{(self._directory / 'log').read_text()[-4000:]}"
        first = min(line["time"] for line in read_metrics(run_dir) if line["time"] > began)
        return losses_of(run_dir), first - began

    def _hold(
        self, name: str, train: Callable[[], tuple[Losses, float]], expected: Losses, bound: float | None
    ) -> float:
        """Train, tell how far the losses are off, and write it down; the error."""
        error, seconds, problem = math.inf, math.nan, ""
        try:
            losses, seconds = train()
            error = _error(losses, expected)
        except (AssertionError, subprocess.TimeoutExpired) as failure:
            problem = str(failure)
        passed = not problem and (bound is None or error <= bound)
        numbers = {"error": error, "bound": bound, "first_step_seconds": seconds}
        self.found["runs"].append(
            {"name": name, "passed": passed, "problem": problem}
            | {
                key: number if number is None or math.isfinite(number) else None
                for key, number in numbers.items()
            }
        )
        self._output.write_text(json.dumps(self.found, indent=1, allow_nan=False) + "\n")
        limit = "" if bound is None else f" (at most {bound:.1e})"
        told = f"error {error:.1e}{limit}, first step after {seconds:.1f} s"
        print(f"{'ok' if passed else 'FAILED':7}{name:45} {problem or told}", flush=True)
        return error


def _command(recipe: Path, ranks: int) -> list[str]:
    return [sys.executable, "-m", "paralign.engine.cli", "train", str(recipe), "--nproc", str(ranks)]


def _error(losses: Losses, expected: Losses) -> float:
    """The largest relative error of any step; infinite where steps are missing."""
    if losses.keys() != expected.keys():
        return float("inf")
    return max(abs(losses[step] / expected[step] - 1) for step in expected)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Layouts, a kill and a resume on this machine's ranks.")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--output", type=Path, default=Path("machine.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        raise SystemExit(not Machine(Path(directory), options.ranks, options.output).passes())


if __name__ == "__main__":
    main()
