"""Batch scripts for SLURM: a recipe and some nodes to the text of an sbatch script. Starts nothing but sbatch."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paralign.models.errors import RecipeError

from .stop import STOPPED

SAVE_SECONDS = 600  # that a run is given at least to save before its time limit ends it


@dataclass(frozen=True)
class Job:
    """What SLURM is asked for.

    Attributes:
        gpus_per_node: a rank runs on each.
        time: in SLURM's notation, such as 2-00:00:00; None leaves its default.
        cpus_per_task: of each rank; None shares a node's evenly.
        mem: of a node, in SLURM's notation; 0 is all of it. Left out where `others` give it by CPU or GPU.
        exclusive: nobody else runs on the nodes.
        requeue: queue the job again when its time limit stops the run.
        save_seconds: that a save takes; the warning before the time limit comes early enough for three.
        others: any other option of sbatch by its long name, with None where it takes no value; they go before those
            that follow from the fields above.
        env: environment variables of every rank, by name.
    """

    nodes: int
    gpus_per_node: int
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    cpus_per_task: int | None = None
    mem: str = "0"
    exclusive: bool = True
    requeue: bool = False
    save_seconds: float = 0.0
    others: Mapping[str, str | None] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def options_of(words: Sequence[str]) -> dict[str, str | None]:
    """`qos=high`, `--qos=high` or `overcommit`, as sbatch has them, by name.

    Raises:
        RecipeError: not such an option.
    """
    found = {}
    for word in words:
        name, given, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", name):
            raise RecipeError(
                f"--sbatch {word!r}: expected a long option of sbatch, such as qos=high or overcommit"
            )
        found[name] = value if given else None
    return found


def variables_of(words: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE`, by name.

    Raises:
        RecipeError: not such a variable.
    """
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        if not (given and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
            raise RecipeError(f"--env {word!r}: expected NAME=VALUE, such as NCCL_DEBUG=INFO")
        found[name] = value
    return found


def batch_script(recipe: Path, overrides: Sequence[str], job: Job, *, run_dir: Path) -> str:
    """The sbatch script: one task a GPU, all on one srun; a signal ten minutes before the end lets the run save.

    With `requeue`, a run that this signal stopped is put back into the queue and resumes by itself. SLURM sends the
    same signal before it preempts, where the cluster has `send_user_signal`. Anything else ends the job for good.

    Raises:
        RecipeError: a value that no line of a batch script can hold.
    """
    run_dir = run_dir.absolute()  # sbatch's chdir does not move it
    log = str(run_dir).replace("\\", "\\\\").replace("%", "%%") + "/slurm-%j.log"
    options: dict[str, str | None] = {
        "job-name": recipe.stem,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.gpus_per_node),
        "gpus-per-node": str(job.gpus_per_node),
        "mem": job.mem,
        "output": log,
        "open-mode": "append",
        "signal": f"USR1@{max(SAVE_SECONDS, math.ceil(3 * job.save_seconds))}",
    }
    for name in ("partition", "account", "time", "cpus_per_task"):
        if (value := getattr(job, name)) is not None:
            options[name.replace("_", "-")] = str(value)
    options |= {name: None for name in ("exclusive", "requeue") if getattr(job, name)}
    if any(name.startswith("mem-per-") for name in job.others):
        del options["mem"]  # sbatch refuses both
    options |= job.others
    lines = [
        f"#SBATCH --{name}" + ("" if value is None else f"={_quoted(name, value)}")
        for name, value in options.items()
    ]
    # srun does not take it from sbatch, and without it each rank would have one core.
    cpus = options.get("cpus-per-task") or f"$((SLURM_CPUS_ON_NODE / {options['ntasks-per-node']}))"
    rank = shlex.join([sys.executable, "-m", "paralign.engine.run", str(recipe), *overrides])
    before = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.env.items())
    again = ""
    if job.requeue:
        # Not srun's code: the first rank that leaves with 75 has the others ended, and srun then gives theirs.
        marker = f"{shlex.quote(str(run_dir))}/slurm-$SLURM_JOB_ID.stopped"
        before += f'export {STOPPED}={marker}\nrm -f "${STOPPED}"\n'
        again = f'[ "$(cat "${STOPPED}" 2>/dev/null)" = SIGUSR1 ] && scontrol requeue "$SLURM_JOB_ID"\n'
    return (
        "#!/usr/bin/env bash\n"
        + "\n".join(lines)
        + "\n\n"
        + "# One rank that fails ends the others; USR1 goes to every rank, and the run saves at its next step.\n"
        + f'{before}srun --kill-on-bad-exit=1 --cpus-per-task="{cpus}" {rank}\n'
        + f"code=$?\n{again}exit $code\n"
    )


def waits_of_slurm() -> dict[str, int]:
    """Seconds that this cluster leaves a job after SIGTERM: KillWait, and the shortest GraceTime before preemption.

    Empty where there is no SLURM, or none that answers.
    """
    found: dict[str, int] = {}
    for command in (["config"], ["partition", "--oneliner"]):
        try:
            said = subprocess.run(
                ["scontrol", "show", *command], capture_output=True, text=True, timeout=3
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            return {}
        for name, seconds in re.findall(r"\b(KillWait|GraceTime)\s*=\s*(\d+)", said):
            if name == "KillWait" or int(seconds):  # no grace: nobody preempts, or at once
                found[name] = min(int(seconds), found.get(name, int(seconds)))
    return found


def _quoted(name: str, value: str) -> str:
    """The value as sbatch reads it in a line of the script."""
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", value):
        return value
    if re.search(r'["\n\r]', value) or not value:
        raise RecipeError(
            f"sbatch --{name}: {value!r} cannot stand in a batch script; give a value without quotes"
        )
    return f'"{value}"'


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
