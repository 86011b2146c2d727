"""Signals as clusters send them, to whole process groups: a run saves, leaves with 75, and goes on to the bit.

torchrun signals the group of each rank, SLURM every process of a step. What a rank has started is in its group: the
manager and the writers of a save, the processes that tokenise.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paralign.engine.checkpoint import store
from paralign.engine.processes.stop import EXIT_STOPPED

from .pool import RankPool
from .toy import losses_of, make_toy, train_recipe, write_recipe

STEPS = 16
STARTS: dict[str, Callable[[Path], bool]] = {  # by name of a moment: whether it has come
    # After a first save, whose manager lives on and would die of the signal.
    "a step": lambda run_dir: store.latest(run_dir / "checkpoints") is not None,
    "a save": lambda run_dir: _written(run_dir) > 0,
    "an asynchronous save": lambda run_dir: _written(run_dir) > 0,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("signals")
    make_toy(directory)
    return directory


def _recipe(toy: Path, name: str, moment: str = "", **changes: object) -> Path:
    return write_recipe(
        toy,
        name,
        {},
        train__max_steps=STEPS,
        train__eval_every_steps=None,
        checkpoint__save_every_steps=4 if moment else None,  # a save costs seconds
        checkpoint__async_save=moment == "an asynchronous save",
        **changes,
    )


@pytest.fixture(scope="module")
def undisturbed(toy: Path, ranks: RankPool) -> dict[int, dict[int, float]]:
    """Losses by number of ranks."""
    for world_size in (1, 2):
        ranks.run(world_size, train_recipe, _recipe(toy, f"undisturbed-{world_size}"))
    return {world_size: losses_of(toy / f"undisturbed-{world_size}") for world_size in (1, 2)}


def _written(run_dir: Path) -> int:
    """Files of tensors of a checkpoint that is being written."""
    return len(list(run_dir.glob("checkpoints/iter_*.part/*.distcp")))


class Group:
    """One rank as the leader of a session, as torchrun starts it; forked from here, where all is imported."""

    def __init__(self, recipe: Path, log: Path) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            from paralign.engine.run.__main__ import main

            code = main([str(recipe)])
            sys.stdout.flush()
            from multiprocessing.util import _exit_function  # what a process does at its end

            _exit_function()
        finally:
            os._exit(code)

    def signal(self, number: int) -> None:
        os.killpg(self.pid, number)

    def wait(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError(f"did not end in {seconds} s:\n{self.log.read_text()}")

    def left(self) -> list[str]:
        """Command lines of what is left of the group, once it has had five seconds to end."""
        deadline = time.monotonic() + 5
        while (found := list(self._processes())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _processes(self) -> Iterator[str]:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, group = (path / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.pid and state != "Z":
                    yield (path / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it has ended meanwhile
                continue


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Path], Group]]:
    groups: list[Group] = []

    def started(recipe: Path) -> Group:
        groups.append(Group(recipe, tmp_path / "log"))
        return groups[-1]

    yield started
    for group in groups:
        try:
            os.killpg(group.pid, signal.SIGKILL)
            os.waitpid(group.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


def _wait_until(moment: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not moment():
        assert time.monotonic() < deadline, f"the run did not come as far:\n{log.read_text()}"
        time.sleep(0.002)


def _saved_all_that_was_done(run_dir: Path) -> None:
    newest = store.latest(run_dir / "checkpoints")
    assert newest is not None
    assert store.read_progress(newest).step == max(losses_of(run_dir)) + 1
    assert not (run_dir / "hf/final").exists()


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("an asynchronous save", signal.SIGTERM),
        ("a save", signal.SIGUSR1),
        pytest.param("a step", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("a step", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("a save", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("an asynchronous save", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_group(
    moment: str,
    number: signal.Signals,
    toy: Path,
    undisturbed: dict[int, dict[int, float]],
    start: Callable[[Path], Group],
    ranks: RankPool,
) -> None:
    name = f"{number.name} in {moment}".replace(" ", "-")
    group = start(_recipe(toy, name, moment))
    _wait_until(lambda: STARTS[moment](toy / name), group.log)
    group.signal(number)
    assert group.wait() == EXIT_STOPPED, group.log.read_text()
    assert group.left() == []
    assert "rror" not in group.log.read_text()
    _saved_all_that_was_done(toy / name)
    ranks.run(1, train_recipe, _recipe(toy, name))
    assert losses_of(toy / name) == undisturbed[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_the_group_in_start_up(
    number: signal.Signals, toy: Path, start: Callable[[Path], Group]
) -> None:
    """It comes while processes of the group tokenise, which takes as long as the data are large."""
    turns = [{"role": "user", "content": "red " * 400}, {"role": "assistant", "content": "blue " * 400}]
    line = json.dumps({"messages": turns}) + "\n"
    (toy / "many.jsonl").write_text(line * 40_000)
    cache = toy / f"cache-{number.name}"
    data = {"train": str(toy / "many.jsonl"), "workers": 2, "too_long": "drop", "cache_dir": str(cache)}
    group = start(_recipe(toy, "start", **{f"data__{key}": value for key, value in data.items()}))
    _wait_until(lambda: any(path.stat().st_size for path in cache.glob(".*/tokens.bin")), group.log)
    group.signal(number)
    assert group.wait(5) == EXIT_STOPPED, group.log.read_text()
    assert group.left() == []
    assert f"{number.name} in start-up" in group.log.read_text()
    assert not (toy / "start").exists()


RANK = """\
# A rank of torchrun that leaves its exit code behind; itself it outlives the signal to its group.
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)
code = subprocess.call([sys.executable, "-m", "paralign.engine.run", sys.argv[2]])
open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").write(str(code))
sys.exit(code)
"""


@pytest.mark.parametrize(
    "moment",
    [
        "a save",
        pytest.param("start-up", marks=pytest.mark.slow),
        pytest.param("a step", marks=pytest.mark.slow),
        pytest.param("an asynchronous save", marks=pytest.mark.slow),
    ],
)
def test_torchrun_is_asked_to_stop(
    moment: str, toy: Path, tmp_path: Path, undisturbed: dict[int, dict[int, float]], ranks: RankPool
) -> None:
    name = f"torchrun in {moment}".replace(" ", "-")
    run_dir = toy / name
    recipe = _recipe(toy, name, moment)
    (tmp_path / "rank.py").write_text(RANK)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_endpoint=127.0.0.1:0",
    ]
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(
            [*command, "--rdzv_backend=c10d", str(tmp_path / "rank.py"), str(tmp_path), str(recipe)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        if moment == "start-up":
            _wait_until(lambda: _importing_torch(recipe) == 2, tmp_path / "log")
        else:
            _wait_until(lambda: STARTS[moment](run_dir), tmp_path / "log")
        torchrun.send_signal(signal.SIGTERM)
        torchrun.wait(60)
    finally:
        torchrun.kill()
    codes = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert codes == [str(EXIT_STOPPED)] * 2, (tmp_path / "log").read_text()
    if moment != "start-up":
        _saved_all_that_was_done(run_dir)
    ranks.run(2, train_recipe, _recipe(toy, name))
    assert losses_of(run_dir) == undisturbed[2]


def _importing_torch(recipe: Path) -> int:
    """Ranks that have begun to import torch, which takes them seconds."""
    found = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = f"paralign.engine.run\0{recipe}\0" in (path / "cmdline").read_text()
            found += is_rank and "libtorch" in (path / "maps").read_text()
        except OSError:
            continue
    return found
