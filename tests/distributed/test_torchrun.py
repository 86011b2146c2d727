"""torchrun's restarts: a killed rank, a killed node that comes back or stays away, a killed agent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .pool import RankPool, free_port
from .processes import Processes
from .toy import losses_of, make_toy, train_recipe, write_recipe

STEPS = 60


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("torchrun")
    make_toy(directory)
    return directory


@pytest.fixture(scope="module")
def undisturbed(toy: Path, ranks: RankPool) -> dict[int, float]:
    ranks.run(2, train_recipe, _recipe(toy, "undisturbed"))
    return losses_of(toy / "undisturbed")


def _recipe(toy: Path, name: str, **changes: Any) -> Path:
    settings = {
        "train__max_steps": STEPS,
        "train__eval_every_steps": None,
        "checkpoint__save_every_steps": 5,
        "checkpoint__keep_last": 2,
    }
    return write_recipe(toy, name, {}, **(settings | changes))


def _two_nodes(processes: Processes, recipe: Path, port: int, nodes: str) -> tuple[Any, Any]:
    """Two agents; the first hosts the rendezvous, and may not die."""
    host = _agent(processes, recipe, port, nodes)
    processes.wait_until(lambda: _listens(port))
    return host, _agent(processes, recipe, port, nodes)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _agent(processes: Processes, recipe: Path, port: int, nodes: str) -> Any:
    return processes.torchrun(
        *("--nnodes", nodes, "--nproc_per_node", "1", "--max-restarts", "3"),
        *("--rdzv_id", "toy", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"),
        *("--rdzv_conf", "join_timeout=120,last_call_timeout=2,timeout=60,keep_alive_interval=1"),
        *("-m", "paralign.engine.run", str(recipe)),
        # A new agent would wait for ever for an address that the first one tells only once.
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )


@pytest.mark.slow
def test_a_killed_rank_is_started_again(
    toy: Path, undisturbed: dict[int, float], processes: Processes
) -> None:
    recipe, run_dir = _recipe(toy, "rank"), toy / "rank"
    agent = processes.torchrun(
        *("--standalone", "--max-restarts", "2", "--nproc_per_node", "2"),
        *("-m", "paralign.engine.run", str(recipe)),
    )
    for kills, step in enumerate((7, 17)):
        processes.wait_until(lambda step=step: len(losses_of(run_dir)) > step)  # type: ignore[misc]
        os.kill(processes.ranks()[kills], signal.SIGKILL)
    assert agent.wait(120) == 0, processes.log.read_text()[-4000:]
    assert losses_of(run_dir) == undisturbed
    assert processes.left() == []


@pytest.mark.slow
def test_a_killed_node_is_brought_back(
    toy: Path, undisturbed: dict[int, float], processes: Processes
) -> None:
    recipe, run_dir, port = _recipe(toy, "back"), toy / "back", free_port()
    host, other = _two_nodes(processes, recipe, port, "2")
    processes.wait_until(lambda: len(losses_of(run_dir)) > 7)
    other.kill()
    processes.wait_until(lambda: not processes.ranks(of=other.pid))
    again = _agent(processes, recipe, port, "2")
    assert host.wait(180) == 0, processes.log.read_text()[-4000:]
    assert again.wait(60) == 0
    assert losses_of(run_dir) == undisturbed
    assert processes.left() == []


@pytest.mark.slow
def test_a_run_goes_on_without_a_node_that_stays_away(
    toy: Path, undisturbed: dict[int, float], processes: Processes
) -> None:
    """At half the data-parallel degree: the same samples, and losses but for the order of sums."""
    recipe, run_dir, port = _recipe(toy, "away"), toy / "away", free_port()
    host, other = _two_nodes(processes, recipe, port, "1:2")
    processes.wait_until(lambda: len(losses_of(run_dir)) > 7)
    assert len(processes.ranks()) == 2
    other.kill()
    assert host.wait(180) == 0, processes.log.read_text()[-4000:]
    assert losses_of(run_dir) == pytest.approx(undisturbed, rel=1e-5)
    assert processes.left() == []


@pytest.mark.slow
def test_nothing_outlives_a_killed_agent(toy: Path, processes: Processes) -> None:
    recipe = _recipe(toy, "agent", train__max_steps=100_000, checkpoint__async_save=True)
    agent = processes.torchrun(
        *("--standalone", "--nproc_per_node", "2", "-m", "paralign.engine.run", str(recipe))
    )
    processes.wait_until(lambda: len(losses_of(toy / "agent")) > 7)
    agent.kill()
    assert processes.left() == []


def test_an_error_reaches_the_error_file_of_torchrun(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    command = [sys.executable, "-m", "paralign.engine.run", str(tmp_path / "absent.yaml")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    told = json.loads((tmp_path / "error.json").read_text())
    assert "absent.yaml" in told["message"]["message"]
