"""A rank as it is started: what it says where it cannot begin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paralign.engine.processes import variables
from paralign.engine.processes.launch import RankEnv
from paralign.engine.processes.stop import Stop
from paralign.engine.run import rank as module
from paralign.engine.run.rank import run


@pytest.mark.parametrize("arguments", [[], ["--replay-step=3"], ["--resave"]])
def test_a_rank_without_a_recipe_says_so_and_exits_with_2(
    project: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        run(arguments, Stop())
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: no recipe given; expected RECIPE [--replay-step=N | --resave] [key.sub=value …]\n"
    )


@pytest.mark.parametrize(("rank", "local_rank", "prints"), [(0, 0, True), (1, 1, False), (8, 0, True)])
def test_what_is_wrong_with_a_node_is_said_by_its_first_rank(
    rank: int, local_rank: int, prints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert module._first_to_fail(RankEnv(rank, local_rank, 16, "host:1"), []) == prints


ENTRY = """
import os, sys, types
from paralign.engine.run.__main__ import main

def run(arguments, stop):
    print(os.environ.get("PYTORCH_ALLOC_CONF"), "torch" in sys.modules)
    return 0

sys.modules["paralign.engine.run.rank"] = types.SimpleNamespace(run=run)
sys.exit(main([]))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "None"),
    ],
)
def test_the_allocator_is_set_before_torch_reads_it(given: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    result = subprocess.run([sys.executable, "-c", ENTRY], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == [expected, "False"], result.stderr


# Up to where the rank would meet the others; sees what is asked of CUDA, and what it would read of the environment.
START = """
import os, sys
import torch

asked = []

def watched(function):
    def ask(*arguments, **options):
        asked.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        return function(*arguments, **options)
    return ask

for name in ("is_available", "device_count", "current_device", "init", "_lazy_init"):
    setattr(torch.cuda, name, watched(getattr(torch.cuda, name)))

from paralign.engine.processes import variables
from paralign.engine.processes.launch import RankEnv
from paralign.engine.processes.stop import Stop
from paralign.engine.run import rank

def meet_and_train(*arguments, **options):
    import paralign.engine.parallel.mesh
    print(*asked)
    return True

variables._compute_capability = lambda: 9
rank.meet_and_train = meet_and_train
rank.run(sys.argv[1:], Stop())
"""


def test_nothing_is_asked_of_cuda_before_its_variables_are_set(project: Path) -> None:
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    command = [sys.executable, "-c", START, str(project / "recipe.yaml")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert set(result.stdout.split()) == {"1"}, result.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_number_of_the_users_is_told_once(
    rank: int, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setattr(variables, "_compute_capability", lambda: 9)
    monkeypatch.setattr(module, "meet_and_train", lambda *arguments, **options: True)
    assert module.run([str(project / "recipe.yaml")], Stop()) == 0
    assert ("CUDA_DEVICE_MAX_CONNECTIONS=8 stays" in capsys.readouterr().err) == (rank == 0)
