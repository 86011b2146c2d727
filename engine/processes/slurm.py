"""Batch scripts for SLURM: a recipe and some nodes to the text of an sbatch script. Starts nothing but sbatch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paralign.models.errors import RecipeError

from .stop import EXIT_STOPPED

FAILED = "PARALIGN_FAILED"  # environment: a file that a rank makes when an error ends it
SAVE_SECONDS = 600  # what a run is given to save before its time limit ends it


@dataclass(frozen=True)
class Job:
    """What SLURM is asked for; `time` is in its notation, such as 2-00:00:00, and None leaves its default."""

    nodes: int
    gpus_per_node: int
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    requeue: bool = False


def batch_script(recipe: Path, overrides: Sequence[str], job: Job, *, run_dir: Path) -> str:
    """The sbatch script: one task a GPU, all on one srun; a signal ten minutes before the end lets the run save.

    With `requeue`, a run that saved and stopped is put back into the queue and resumes by itself.
    """
    options = {
        "job-name": recipe.stem,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.gpus_per_node),
        "gpus-per-node": str(job.gpus_per_node),
        "partition": job.partition,
        "account": job.account,
        "time": job.time,
        "output": str(run_dir / "slurm-%j.log"),
        "open-mode": "append",
        "signal": f"USR1@{SAVE_SECONDS}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    if job.requeue:
        lines.append("#SBATCH --requeue")
    rank = shlex.join([sys.executable, "-m", "paralign.engine.run", str(recipe), *overrides])
    before = again = ""
    if job.requeue:
        # srun's code is the highest: ranks that are ended in start-up because one has failed say that they stopped.
        before = (
            f'export {FAILED}={shlex.quote(str(run_dir))}/slurm-$SLURM_JOB_ID.failed\nrm -f "${FAILED}"\n'
        )
        again = f'[ "$code" = {EXIT_STOPPED} ] && [ ! -e "${FAILED}" ] && scontrol requeue "$SLURM_JOB_ID"\n'
    return (
        "#!/usr/bin/env bash\n"
        + "\n".join(lines)
        + "\n\n"
        + "# One rank that fails ends the others; USR1 goes to every rank, and the run saves at its next step.\n"
        + f"{before}srun --kill-on-bad-exit=1 {rank}\n"
        + f"code=$?\n{again}exit $code\n"
    )


def submit(script: str, *, run_dir: Path) -> str:
    """Write `run_dir/launch.sbatch` and hand it to sbatch; what sbatch said.

    Raises:
        RecipeError: sbatch is not here, or refuses.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "launch.sbatch"
    path.write_text(script, encoding="utf-8")
    try:
        result = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        raise RecipeError(f"{path}: written, but there is no sbatch here; run it on a login node") from None
    if result.returncode:
        raise RecipeError(f"sbatch {path}: {result.stderr.strip()}")
    return result.stdout.strip()
