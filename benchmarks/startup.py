"""Times the start of a run on a warm cache: from the command to the end of its first step.

    python benchmarks/startup.py RECIPE [--nproc 1] [--repeats 5] [key.sub=value …]

The recipe's data are tokenised first; each repeat trains one step into a run_dir of its own. Beside it, in the same
run, what the same machine needs to import what a rank imports, and nothing else: the floor. Prints medians of the
wall clock, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paralign.engine.observe.metrics import read_metrics
from paralign.engine.run.check import open_set
from paralign.engine.run.recipe import load

ONE_STEP = (
    "train.max_steps=1",
    "train.epochs=null",
    "train.eval_every_steps=null",
    "checkpoint.save_every_steps=null",
)
IMPORTS = "import paralign.engine.run.assemble, transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description="From the command to the end of the first step.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_intermixed_args()
    recipe = load(arguments.recipe, arguments.overrides)
    for sources in recipe.data.sets.values():
        open_set(recipe, sources, progress=False)

    checks, imports, steps = [], [], []
    for _ in range(arguments.repeats):
        checks.append(
            _seconds(
                [
                    sys.executable,
                    "-m",
                    "paralign.engine.cli",
                    "check",
                    str(arguments.recipe),
                    *arguments.overrides,
                ]
            )
        )
        imports.append(_seconds([sys.executable, "-c", IMPORTS]))
        steps.append(_first_step(arguments.recipe, arguments.overrides, arguments.nproc))
    found = {
        "paralign check": statistics.median(checks),
        "imports of a rank": statistics.median(imports),
        "first step done": statistics.median(steps),
    }
    for name, seconds in found.items():
        print(f"{name:<20}{seconds:>8.2f} s")
    print(json.dumps({"nproc": arguments.nproc, "repeats": arguments.repeats, **found}))


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _first_step(recipe: Path, overrides: list[str], nproc: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "paralign.engine.cli", "train", str(recipe), "--nproc", str(nproc)]
        began = time.time()
        subprocess.run(
            [*command, *overrides, f"run_dir={folder}", *ONE_STEP], check=True, stdout=subprocess.DEVNULL
        )
        return float(read_metrics(Path(folder))[0]["time"]) - began


if __name__ == "__main__":
    main()
