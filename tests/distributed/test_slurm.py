"""`paralign launch` under a real SLURM: time limit, requeue, scancel, a signal in start-up, a node that goes down."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paralign.engine.checkpoint import store
from paralign.engine.observe.metrics import read_metrics

from .cluster import NODES, Cluster
from .processes import MARK
from .toy import make_toy, write_recipe

AGAIN = 400  # seconds; SLURM lets a job that is queued again wait for two minutes
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not Cluster.is_possible(), reason="needs root, slurmctld, slurmd, slurm-client, munge"
    ),
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("slurm")
    make_toy(directory)
    return directory


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as up:
        yield up


def _launch(cluster: Cluster, toy: Path, name: str, *options: str, **changes: Any) -> str:
    """Submit a run over two nodes of two ranks; the job's number."""
    settings: dict[str, Any] = {
        "train__eval_every_steps": None,
        "train__log_every_steps": 1,
        "checkpoint__save_every_steps": None,
        "checkpoint__keep_last": 2,
    }
    recipe = write_recipe(toy, name, {"tensor_model_parallel_size": 2}, **(settings | changes))
    command = [sys.executable, "-m", "paralign.engine.cli", "launch", str(recipe)]
    command += ["--nodes", "2", "--gpus-per-node", "2", "--requeue", *options]
    environment = os.environ | cluster.environment | {"OMP_NUM_THREADS": "1", MARK: cluster.processes.mark}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    number = re.search(r"Submitted batch job (\d+)", result.stdout)
    assert number, result.stdout
    return number[1]


def _steps(run_dir: Path) -> list[int]:
    if not (run_dir / "metrics.jsonl").exists():
        return []
    return [line["step"] for line in read_metrics(run_dir) if "loss" in line]


def _saved(run_dir: Path) -> int:
    newest = store.latest(run_dir / "checkpoints")
    return store.read_progress(newest).step if newest else 0


def test_a_run_that_its_time_limit_stops_goes_on_by_itself(cluster: Cluster, toy: Path) -> None:
    run_dir = toy / "limit"
    job = _launch(
        *(cluster, toy, "limit", "--time", "2", "--sbatch", "signal=USR1@45"), train__max_steps=100_000
    )
    found = cluster.wait_for(job, lambda job: job["Restarts"] == "1", 240)
    saved = _saved(run_dir)
    assert saved == max(_steps(run_dir)) + 1, Path(found["StdOut"]).read_text()[-3000:]
    cluster.wait_for(job, lambda _: max(_steps(run_dir)) > saved + 5, AGAIN)
    cluster.said("scancel", job)
    cluster.wait_for(job, lambda job: job["JobState"] == "CANCELLED", 60)
    assert _steps(run_dir) == list(range(len(_steps(run_dir))))
    cluster.processes.wait_until(lambda: cluster.states() == ["idle"] * 2, 60)


def test_scancel_ends_a_run_for_good_and_it_is_saved(cluster: Cluster, toy: Path) -> None:
    run_dir = toy / "cancel"
    job = _launch(cluster, toy, "cancel", train__max_steps=100_000)
    cluster.wait_for(job, lambda _: len(_steps(run_dir)) > 5, 120)
    cluster.said("scancel", job)
    found = cluster.wait_for(job, lambda job: job["JobState"] == "CANCELLED", 60)
    cluster.processes.wait_until(lambda: cluster.states() == ["idle"] * 2, 60)
    assert found["Restarts"] == "0"
    assert _saved(run_dir) == max(_steps(run_dir)) + 1
    assert cluster.job(job)["JobState"] == "CANCELLED"


def test_a_signal_in_start_up_queues_again(cluster: Cluster, toy: Path) -> None:
    run_dir = toy / "early"
    job = _launch(cluster, toy, "early", train__max_steps=10)
    cluster.wait_for(job, lambda job: job["JobState"] == "RUNNING" and cluster.ranks() > 0, 120)
    cluster.said("scancel", "--signal=USR1", job)
    cluster.wait_for(job, lambda job: job["Restarts"] == "1", 60)
    cluster.wait_for(job, lambda job: job["JobState"] == "COMPLETED", AGAIN)
    assert _steps(run_dir) == list(range(10))


def test_a_run_goes_on_when_a_node_that_went_down_is_back(cluster: Cluster, toy: Path) -> None:
    run_dir = toy / "node"
    job = _launch(cluster, toy, "node", train__max_steps=150, checkpoint__save_every_steps=20)
    cluster.wait_for(job, lambda _: _saved(run_dir) > 0, 120)
    cluster.take_down(NODES[1])
    cluster.wait_for(job, lambda job: job["Restarts"] == "1", 120)
    cluster.bring_up(NODES[1])
    cluster.wait_for(job, lambda job: job["JobState"] == "COMPLETED", AGAIN)
    assert _steps(run_dir) == list(range(150))
