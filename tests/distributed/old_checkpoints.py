"""Small checkpoints written by the code of a commit, and what that commit made of them.

    python -m tests.distributed.old_checkpoints COMMIT DIRECTORY

The commit is taken out of git into `DIRECTORY/source` and trains there by its own command line, as a user would
have done: each case ten steps without a break, the state after five of them kept. What later code is held against
is therefore what that code itself would have gone on to. Recipes are written in the keys of 40ec5b1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .toy import make_preferences, make_toy, write_recipe

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2-PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
}


@dataclass(frozen=True)
class Case:
    """One run: what it learns, in which precision, on how many ranks, and whether its gradients are clipped.

    Without a fused kernel 40ec5b1 added squares up in fp32, and now that is done in fp64. The norms differ in their
    last digits, and with them the factor that a gradient is clipped by: runs that clip cannot be equal to the bit.
    """

    objective: str
    dtype: str
    layout: str
    clips: bool = False

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.dtype}-{self.layout}{'-clipped' if self.clips else ''}"

    @property
    def world_size(self) -> int:
        return LAYOUTS[self.layout][0]

    def recipe(self, directory: Path, name: str, **changes: Any) -> Path:
        """Writes the recipe of this case for the toy in `directory`, with `name` as its run."""
        # A cache for each run: what a reference model says, computed at another layout, differs in its last bits.
        settings: dict[str, Any] = {
            "model__dtype": self.dtype,
            "optimizer__clip_grad": 1.0 if self.clips else 1000.0,
            "data__cache_dir": str(directory / f"cache of {name}"),
        }
        if self.objective == "dpo":
            pairs = str(directory / "pairs.jsonl")
            settings |= {
                "objective": {"name": "dpo", "beta": 0.1},
                "data__train": pairs,
                "data__validation": {"same": pairs},
                "train__global_batch_size": 4,
            }
        return write_recipe(directory, name, LAYOUTS[self.layout][1], **(settings | changes))


CASES = [
    Case(objective, dtype, layout)
    for objective in ("sft", "dpo")
    for dtype in ("fp32", "bf16")
    for layout in LAYOUTS
] + [Case("sft", "fp32", "DP2", clips=True)]


def write_old_checkpoints(commit: str, directory: Path) -> None:
    """Fill `directory` with the toy and, for each case, the run of `commit` in `NAME/`.

    Raises:
        CalledProcessError: git does not know the commit, or a run failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    make_toy(directory)
    make_preferences(directory)
    source = directory / "source"
    source.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(source)], check=True, input=archive.stdout)
    environment = {**os.environ, "PYTHONPATH": str(source / "src")}
    command = [sys.executable, "-m", "paralign.engine.cli", "train"]
    for case in CASES:
        recipe = case.recipe(directory, case.name)
        subprocess.run(
            [*command, str(recipe), "--nproc", str(case.world_size)],
            check=True,
            cwd=directory,  # not in a checkout: nothing but PYTHONPATH says which code runs
            env=environment,
            stdout=subprocess.DEVNULL,
            timeout=240,
        )


if __name__ == "__main__":
    write_old_checkpoints(sys.argv[1], Path(sys.argv[2]).resolve())
