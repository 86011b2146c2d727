"""Random kills of real processes: how many are survived, what they cost, what they leave running.

    python -m tests.distributed.campaign RESULTS.jsonl [--kills 100] [--seed 0]

Each kill is one line of RESULTS.jsonl; a campaign that was cut off goes on after its last line. A trial starts a run
of two ranks, or `paralign convert` or `merge`. It waits for a moment, kills with SIGKILL, counts what is alive five
seconds later, and starts again. Survived means: this ends with exit code 0, with the losses of every step and the
bytes of the model that a run has which nobody kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from paralign.engine.checkpoint import store

from .processes import Processes
from .toy import losses_of, make_toy, write_recipe

STEPS = 24
PARALIGN = (sys.executable, "-m", "paralign.engine.cli")
RUNS = ("step", "save", "asynchronous save", "export", "tokenising")
TOOLS = ("convert", "merge")
# A writer is a process of its own in asynchronous saves alone, and tools have one process.
CELLS = [
    *(
        (victim, moment)
        for victim in ("rank", "launcher", "process group", "torchrun agent")
        for moment in RUNS
    ),
    ("writer", "asynchronous save"),
    *((victim, moment) for victim in ("rank", "process group") for moment in TOOLS),
]


@dataclass(frozen=True)
class Trial:
    """One kill and what came of it; `steps_lost` counts steps that were done twice, `seconds` the whole trial."""

    number: int
    victim: str
    moment: str
    survived: bool
    steps_lost: int
    left: int
    seconds: float
    remark: str = ""


class Campaign:
    """Trials in one directory, on toys that are made once."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.seed = seed
        make_toy(directory, n_chats=3000)
        model = str(directory / "model")
        (directory / "merge.yaml").write_text(
            json.dumps(
                {
                    "merge_method": "linear",
                    "dtype": "float32",
                    "models": [{"model": model, "parameters": {"weight": 1.0}}] * 2,
                }
            )
        )
        self._expected: tuple[dict[int, float], str] | None = None

    def trial(self, number: int) -> Trial:
        """The kill of this number: its cell, its moment and its victim follow from the seed and the number alone."""
        draw = random.Random(f"{self.seed} {number}")
        victim, moment = CELLS[number % len(CELLS)]
        began = time.monotonic()
        with Processes(self.directory / f"log-{number}") as processes:
            try:
                play = self._tool if moment in TOOLS else self._run
                lost, left = play(number, victim, moment, draw, processes)
                remark = ""
            except AssertionError as error:
                lost, left, remark = 0, [], str(error)[-600:]
        seconds = round(time.monotonic() - began, 1)
        return Trial(number, victim, moment, not remark, lost, len(left), seconds, remark or "; ".join(left))

    def _recipe(self, name: str, moment: str) -> Path:
        changes: dict[str, object] = {
            "train__max_steps": STEPS,
            "train__eval_every_steps": None,
            "checkpoint__save_every_steps": 4,
            "checkpoint__async_save": moment == "asynchronous save",
            "checkpoint__export_every_steps": 4 if moment == "export" else None,
        }
        recipe = write_recipe(self.directory, name, {}, **changes)
        if moment == "tokenising":
            text = recipe.read_text()
            recipe.write_text(
                text.replace(
                    f"cache_dir: {self.directory}/cache", f"cache_dir: {self.directory}/{name}.cache"
                )
            )
        return recipe

    def _run(
        self, number: int, victim: str, moment: str, draw: random.Random, processes: Processes
    ) -> tuple[int, list[str]]:
        name = f"run-{number}"
        recipe, run_dir = self._recipe(name, moment), self.directory / name
        after = draw.randrange(2, STEPS - 8)
        moments: dict[str, Callable[[], bool]] = {
            "step": lambda: True,
            "save": lambda: _there(run_dir, "checkpoints/iter_*.part"),
            "asynchronous save": lambda: bool(processes.writers()),
            "export": lambda: _there(run_dir, "hf/*.part"),
            "tokenising": lambda: _there(self.directory, f"{name}.cache/*"),
        }
        if victim == "torchrun agent":
            process = processes.torchrun(
                *("--standalone", "--nproc_per_node", "2", "-m", "paralign.engine.run", str(recipe))
            )
        else:
            process = processes.start([*PARALIGN, "train", str(recipe), "--nproc", "2"])
        if moment != "tokenising":
            processes.wait_until(lambda: len(losses_of(run_dir)) > after or process.poll() is not None)
        processes.wait_until(lambda: moments[moment]() or process.poll() is not None, pause=0.002)
        time.sleep(draw.random() * 0.05)
        done = len(losses_of(run_dir))
        ranks = processes.ranks()
        with suppress(ProcessLookupError, KeyError):
            if victim in ("launcher", "torchrun agent"):
                process.kill()
            elif victim == "writer":
                os.kill(draw.choice(processes.writers()), signal.SIGKILL)
            elif victim == "rank":
                os.kill(ranks[draw.randrange(2)], signal.SIGKILL)
            else:
                os.killpg(ranks[draw.randrange(2)], signal.SIGKILL)
        with suppress(Exception):
            process.wait(60)
        left = processes.left()
        newest = store.latest(run_dir / "checkpoints")
        resumed = store.read_progress(newest).step if newest else 0
        self._again([*PARALIGN, "train", str(recipe), "--nproc", "2"], processes)
        losses, model = self._undisturbed(processes)
        assert losses_of(run_dir) == losses, "other losses"
        assert _digest(run_dir / "hf/final") == model, "another model"
        shutil.rmtree(run_dir)
        return max(0, done - resumed), left

    def _tool(
        self, number: int, victim: str, moment: str, draw: random.Random, processes: Processes
    ) -> tuple[int, list[str]]:
        target = self.directory / f"{moment}-{number}"
        source = self.directory / ("model" if moment == "convert" else "merge.yaml")
        arguments = [moment, str(source), str(target), "--max-shard-size", "20KB"]
        process = processes.start([*PARALIGN, *arguments])
        processes.wait_until(
            lambda: _there(self.directory, f".{target.name}.part/*") or process.poll() is not None,
            pause=0.002,
        )
        time.sleep(draw.random() * 0.05)
        with suppress(ProcessLookupError):
            (os.killpg if victim == "process group" else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        left = processes.left()
        if not target.exists():
            self._again([*PARALIGN, *arguments], processes)
        self._again([*PARALIGN, "verify", str(target)], processes)
        shutil.rmtree(target)
        return 0, left

    def _undisturbed(self, processes: Processes) -> tuple[dict[int, float], str]:
        """Losses and model of a run that nobody kills; made once."""
        if self._expected is None:
            recipe, run_dir = self._recipe("undisturbed", "step"), self.directory / "undisturbed"
            self._again([*PARALIGN, "train", str(recipe), "--nproc", "2"], processes)
            self._expected = losses_of(run_dir), _digest(run_dir / "hf/final")
        return self._expected

    @staticmethod
    def _again(command: list[str], processes: Processes) -> None:
        code = processes.start(command).wait(180)
        assert code == 0, f"exit code {code}:\n{processes.log.read_text()[-500:]}"


def _there(directory: Path, pattern: str) -> bool:
    return next(directory.glob(pattern), None) is not None


def _digest(directory: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def trials(results: Path) -> list[Trial]:
    """Those of a campaign so far."""
    return (
        [Trial(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
    )


def summary(done: list[Trial]) -> str:
    """A table by victim and moment, and the sums."""
    lines = ["victim           moment              kills  survived  steps lost  left"]
    for victim, moment in sorted({(trial.victim, trial.moment) for trial in done}):
        of = [trial for trial in done if (trial.victim, trial.moment) == (victim, moment)]
        lines.append(
            f"{victim:16} {moment:18} {len(of):6} {sum(trial.survived for trial in of):9} "
            f"{sum(trial.steps_lost for trial in of):11} {sum(trial.left for trial in of):5}"
        )
    survived, left = sum(trial.survived for trial in done), sum(trial.left for trial in done)
    return "\n".join([*lines, f"{len(done)} kills, {survived} survived, {left} processes left"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Random kills of real processes.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    done = trials(options.results)
    with tempfile.TemporaryDirectory() as directory, options.results.open("a") as file:
        campaign = Campaign(Path(directory), options.seed)
        for number in range(len(done), options.kills):
            done.append(campaign.trial(number))
            file.write(json.dumps(asdict(done[-1])) + "\n")
            file.flush()
            print(json.dumps(asdict(done[-1])), flush=True)
    print(summary(done))


if __name__ == "__main__":
    main()
