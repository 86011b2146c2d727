"""Times the start of a run on a warm cache: from the command to the end of its first step.

    python benchmarks/startup.py RECIPE [--nproc 1 2 4 8] [--repeats 5] [key.sub=value …]

The recipe's data are tokenised first; each repeat trains one step into a run_dir of its own, with each number of
ranks in turn. Beside it, in the same run, what the same machine needs to import what a rank imports, and nothing
else: the floor. And what the process groups take: ranks that have met make them, under torchrun, by this file.
Prints medians of the wall clock, then one line of JSON for each number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from paralign.engine.checkpoint.hf import arch_of
from paralign.engine.observe.metrics import read_metrics
from paralign.engine.processes.launch import rank_environment
from paralign.engine.run.check import open_set
from paralign.engine.run.recipe import Recipe, load

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
    parser.add_argument("--nproc", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_intermixed_args()
    recipe = load(arguments.recipe, arguments.overrides)
    if "RANK" in os.environ:
        _make_groups(recipe)
        return
    for sources in recipe.data.sets.values():
        open_set(recipe, sources, progress=False)

    given = [str(arguments.recipe), *arguments.overrides]
    check = [sys.executable, "-m", "paralign.engine.cli", "check", *given]
    imports = [sys.executable, "-c", IMPORTS]
    alone = {"paralign check": check, "imports of a rank": imports}
    repeats = range(arguments.repeats)
    floor = {name: statistics.median(_seconds(command) for _ in repeats) for name, command in alone.items()}
    for nproc in arguments.nproc:
        groups = [_groups(given, nproc) for _ in repeats]
        found = floor | {
            "groups made": statistics.median(group["seconds"] for group in groups),
            "first step done": statistics.median(_first_step(given, nproc) for _ in repeats),
        }
        print(f"{nproc} ranks, {groups[0]['groups']} groups")
        for name, seconds in found.items():
            print(f"{name:<20}{seconds:>8.2f} s")
        facts = {"nproc": nproc, "repeats": arguments.repeats, "groups": groups[0]["groups"]}
        print(json.dumps(facts | found))


def _make_groups(recipe: Recipe) -> None:
    """As one rank: meet the others, and say how many groups the layout takes, and how long."""
    from paralign.engine.parallel.mesh import open_mesh, open_world

    env = rank_environment()
    env.tell_torch()
    made, theirs = [], dist.new_group

    def new_group(*ranks: object, **options: object) -> object:
        made.append(ranks)
        return theirs(*ranks, **options)

    dist.new_group = new_group
    layout = recipe.resolve_layout(arch_of(recipe.model.hf), env.world_size)
    with open_world(rank=env.rank, world_size=env.world_size, local_rank=env.local_rank, timeout_minutes=5):
        dist.barrier()
        began = time.perf_counter()
        with open_mesh(layout, local_rank=env.local_rank, seed=1) as mesh:
            mesh.barrier()
            if env.rank == 0:
                print(json.dumps({"groups": len(made), "seconds": time.perf_counter() - began}))


def _groups(given: list[str], nproc: int) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    result = subprocess.run([*command, __file__, *given], check=True, stdout=subprocess.PIPE, text=True)
    found: dict = json.loads(result.stdout)
    return found


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _first_step(given: list[str], nproc: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "paralign.engine.cli", "train", *given, "--nproc", str(nproc)]
        began = time.time()
        subprocess.run([*command, f"run_dir={folder}", *ONE_STEP], check=True, stdout=subprocess.DEVNULL)
        return float(read_metrics(Path(folder))[0]["time"]) - began


if __name__ == "__main__":
    main()
