"""Batch scripts: what SLURM is asked for, and what a shell makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paralign.engine.processes.slurm import EXIT_STOPPED as IN_SCRIPTS
from paralign.engine.processes.slurm import SAVE_SECONDS, Job, batch_script, submit
from paralign.engine.processes.stop import EXIT_STOPPED
from paralign.models.errors import RecipeError

RECIPE = Path("/recipes/llama3_70b.yaml")


def _fake(directory: Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def _run(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)


def test_script_asks_for_a_task_a_gpu_and_a_warning_in_time() -> None:
    job = Job(4, 8, partition="gpu", time="2-00:00:00")
    script = batch_script(RECIPE, ["optimizer.lr=1e-5"], job, run_dir=Path("/runs/a"))
    for line in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--time=2-00:00:00",
    ):
        assert f"#SBATCH {line}\n" in script
    assert f"#SBATCH --signal=USR1@{SAVE_SECONDS}\n" in script
    assert "--account" not in script
    assert "--requeue" not in script
    assert f"-m paralign.engine.run {RECIPE} optimizer.lr=1e-5\n" in script


@pytest.mark.parametrize(("code", "requeued"), [(EXIT_STOPPED, True), (0, False), (2, False)])
def test_a_stopped_run_is_queued_again_and_no_other(code: int, requeued: bool, tmp_path: Path) -> None:
    assert IN_SCRIPTS == EXIT_STOPPED
    _fake(tmp_path, "srun", f"exit {code}")
    _fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/said')
    result = _run(batch_script(RECIPE, [], Job(1, 8, requeue=True), run_dir=tmp_path), tmp_path)
    assert result.returncode == code
    assert (tmp_path / "said").exists() == requeued
    if requeued:
        assert (tmp_path / "said").read_text() == "requeue 42\n"


def test_a_run_that_failed_is_not_queued_again_whatever_the_others_said(tmp_path: Path) -> None:
    """One rank fails, the others are ended in start-up and leave with 75; srun's code is the highest."""
    rank = f"PARALIGN_FAILED=$PARALIGN_FAILED {sys.executable} -m paralign.engine.run {tmp_path}/absent.yaml"
    _fake(tmp_path, "srun", f"{rank}; [ $? = 2 ] && exit {EXIT_STOPPED}")
    _fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/said')
    result = _run(batch_script(RECIPE, [], Job(1, 8, requeue=True), run_dir=tmp_path), tmp_path)
    assert "absent.yaml" in result.stderr
    assert (tmp_path / "slurm-42.failed").exists()
    assert not (tmp_path / "said").exists()


def test_overrides_survive_the_shell(tmp_path: Path) -> None:
    _fake(tmp_path, "srun", f'printf "%s\\n" "$@" > {tmp_path}/said')
    _run(batch_script(RECIPE, ["data.train=[a b, $HOME]"], Job(1, 1), run_dir=tmp_path), tmp_path)
    assert (tmp_path / "said").read_text().splitlines()[-1] == "data.train=[a b, $HOME]"


def test_submit_writes_the_script_and_says_what_sbatch_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _fake(tmp_path, "sbatch", 'echo "Submitted batch job 42"')
    assert submit("#!/bin/sh\n", run_dir=tmp_path / "run") == "Submitted batch job 42"
    assert (tmp_path / "run/launch.sbatch").read_text() == "#!/bin/sh\n"
    _fake(tmp_path, "sbatch", 'echo "invalid partition" >&2; exit 1')
    with pytest.raises(RecipeError, match="invalid partition"):
        submit("", run_dir=tmp_path / "run")


def test_without_sbatch_the_script_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="there is no sbatch here"):
        submit("text", run_dir=tmp_path)
    assert (tmp_path / "launch.sbatch").read_text() == "text"
