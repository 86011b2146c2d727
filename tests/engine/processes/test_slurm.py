"""Batch scripts: what SLURM is asked for, and what a shell makes of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from paralign.engine.processes.slurm import (
    SAVE_SECONDS,
    Job,
    batch_script,
    options_of,
    submit,
    variables_of,
    waits_of_slurm,
)
from paralign.engine.processes.stop import EXIT_STOPPED, STOPPED
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


@pytest.mark.parametrize(
    ("said", "code", "requeued"),
    [
        ("SIGUSR1", EXIT_STOPPED, True),
        ("SIGUSR1", 137, True),  # srun's, where the first rank that leaves has the others killed
        ("SIGTERM", EXIT_STOPPED, False),  # scancel, or a rank that failed in start-up has ended the others
        ("", 0, False),
        ("", 2, False),
    ],
)
def test_only_a_run_that_the_time_limit_stopped_is_queued_again(
    said: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    (run_dir / "slurm-42.stopped").write_text("SIGUSR1")  # of the job before it was queued again
    _fake(tmp_path, "srun", f'[ "{said}" ] && printf {said} > "${STOPPED}"\nexit {code}')
    _fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/said')
    result = _run(batch_script(RECIPE, [], Job(1, 8, requeue=True), run_dir=run_dir), tmp_path)
    assert result.returncode == code
    assert (tmp_path / "said").exists() == requeued
    if requeued:
        assert (tmp_path / "said").read_text() == "requeue 42\n"


def test_a_rank_has_its_share_of_the_cores_and_the_job_its_nodes(tmp_path: Path) -> None:
    _fake(tmp_path, "srun", f'printf "%s\n" "$@" > {tmp_path}/said')
    script = batch_script(RECIPE, [], Job(1, 8), run_dir=tmp_path)
    assert "#SBATCH --exclusive\n" in script
    assert "#SBATCH --mem=0\n" in script
    _run(f"export SLURM_CPUS_ON_NODE=96\n{script}", tmp_path)
    assert "--cpus-per-task=12" in (tmp_path / "said").read_text().splitlines()
    script = batch_script(
        RECIPE, [], Job(1, 8, cpus_per_task=6, exclusive=False, mem="100G"), run_dir=tmp_path
    )
    _run(script, tmp_path)
    assert "--cpus-per-task=6" in (tmp_path / "said").read_text().splitlines()
    assert "#SBATCH --cpus-per-task=6\n" in script
    assert "#SBATCH --mem=100G\n" in script
    assert "exclusive" not in script


def test_any_option_of_sbatch_is_passed_on_and_quoted() -> None:
    others = options_of(["qos=high", "--comment=two words", "overcommit", "gpus-per-node=h100:8"])
    script = batch_script(RECIPE, [], Job(1, 8, others=others), run_dir=Path("/runs/100% mine"))
    for line in ("qos=high", 'comment="two words"', "overcommit", "gpus-per-node=h100:8"):
        assert f"#SBATCH --{line}\n" in script
    assert script.count("gpus-per-node") == 1
    assert '#SBATCH --output="/runs/100%% mine/slurm-%j.log"\n' in script
    with pytest.raises(RecipeError, match="expected a long option"):
        options_of(["-p gpu"])
    with pytest.raises(RecipeError, match="cannot stand in a batch script"):
        batch_script(RECIPE, [], Job(1, 8, others={"comment": "a\n#SBATCH --x"}), run_dir=Path("/runs"))


@pytest.mark.parametrize("name", ["mem-per-gpu", "mem-per-cpu"])
def test_memory_is_asked_for_in_one_way_only(name: str) -> None:
    others = options_of([f"{name}=90G"])
    script = batch_script(RECIPE, [], Job(1, 8, others=others), run_dir=Path("/runs"))
    assert f"#SBATCH --{name}=90G\n" in script
    assert "--mem=" not in script


def test_another_working_directory_does_not_move_log_and_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job(1, 8, requeue=True, others={"chdir": "/scratch"})
    script = batch_script(RECIPE, [], job, run_dir=Path("runs/a"))
    assert f"#SBATCH --output={tmp_path}/runs/a/slurm-%j.log\n" in script
    assert f"export {STOPPED}={tmp_path}/runs/a/slurm-$SLURM_JOB_ID.stopped\n" in script


def test_the_warning_leaves_time_for_a_long_save() -> None:
    script = batch_script(RECIPE, [], Job(1, 8, save_seconds=1000), run_dir=Path("/runs"))
    assert "#SBATCH --signal=USR1@3000\n" in script


def test_what_the_cluster_leaves_of_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert waits_of_slurm() == {}
    _fake(tmp_path, "scontrol", "echo KillWait = 30 sec; echo PartitionName=gpu GraceTime=120 Nodes=n1")
    assert waits_of_slurm() == {"KillWait": 30, "GraceTime": 120}


def test_overrides_survive_the_shell(tmp_path: Path) -> None:
    _fake(tmp_path, "srun", f'printf "%s\\n" "$@" > {tmp_path}/said')
    _run(batch_script(RECIPE, ["data.train=[a b, $HOME]"], Job(1, 1), run_dir=tmp_path), tmp_path)
    assert (tmp_path / "said").read_text().splitlines()[-1] == "data.train=[a b, $HOME]"


def test_variables_reach_every_rank_as_they_were_given(tmp_path: Path) -> None:
    _fake(tmp_path, "srun", f'printf "%s\\n" "$NCCL_IB_HCA" "$NCCL_DEBUG_FILE" > {tmp_path}/said')
    env = variables_of(["NCCL_IB_HCA=mlx5_0,mlx5_1", "NCCL_DEBUG_FILE=/logs/a b$x=%h", "EMPTY="])
    assert env["EMPTY"] == ""
    _run(batch_script(RECIPE, [], Job(2, 8, env=env), run_dir=tmp_path), tmp_path)
    assert (tmp_path / "said").read_text().splitlines() == ["mlx5_0,mlx5_1", "/logs/a b$x=%h"]
    for word in ("NCCL_DEBUG", "=INFO", "NCCL-DEBUG=INFO", "A B=1"):
        with pytest.raises(RecipeError, match="expected NAME=VALUE"):
            variables_of([word])


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
