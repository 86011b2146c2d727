"""A directory for one process: who comes second is told, a kill −9 frees it, children do not keep it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paralign.engine.files import lock
from paralign.engine.files.lock import LOCK, locked
from paralign.models.errors import TrainingError

HOLDER = """
import multiprocessing, os, subprocess, sys, time
from pathlib import Path
from paralign.engine.files.lock import locked
with locked(Path(sys.argv[1])):
    children = [os.fork()] if sys.argv[2:] == ["children"] else []
    if children == [0]:
        time.sleep(60)
        os._exit(0)
    if children:
        children.append(subprocess.Popen(["sleep", "60"], close_fds=False).pid)
    print(*children, "locked", flush=True)
    time.sleep(60)
"""


class Holder:
    """A process that keeps a directory locked, and what it started."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        command = [sys.executable, "-c", HOLDER, str(directory), *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "SLURM_JOB_ID": "77"}
        )
        assert self.process.stdout
        self.children = [int(pid) for pid in self.process.stdout.readline().split()[:-1]]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    started: list[Holder] = []
    yield started
    for holder in started:
        holder.kill()
        for pid in holder.children:
            os.kill(pid, signal.SIGKILL)


def test_the_second_is_told_who_has_it_and_a_kill_frees_it(tmp_path: Path, holders: list[Holder]) -> None:
    holders.append(Holder(tmp_path, "children"))
    with pytest.raises(TrainingError) as raised, locked(tmp_path, patience=0.2):
        pytest.fail("it is locked")
    found = re.fullmatch(
        r"run_dir .*: in use by process (\d+) on (\S+), SLURM job 77, since \d{4}-\d\d-\d\d .*; wait for its end, "
        "or give another run_dir",
        str(raised.value),
    )
    assert found
    assert int(found[1]) == holders[0].process.pid

    holders[
        0
    ].kill()  # a fork and a spawned process of it live on, and both have inherited what can be inherited
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 5
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("starter", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "another host"])
def test_a_run_that_is_started_again_waits_until_the_server_forgets_a_lost_node(
    starter: str,
    tmp_path: Path,
    holders: list[Holder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lock, "JUST_ENDING", 0.2)
    holders.append(Holder(tmp_path))
    with pytest.raises(TrainingError, match="in use by process"), locked(tmp_path):
        pytest.fail("it is locked")
    assert "; waiting for its end, 0 s at most" in capsys.readouterr().err
    if starter == "another host":
        monkeypatch.setattr(lock.socket, "gethostname", lambda: "another")
    else:
        monkeypatch.setenv(starter, "77")
    threading.Timer(1, holders[0].kill).start()
    with locked(tmp_path):
        pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"in use by process {holders[0].process.pid} on " in said
    assert "; waiting for its end, 120 s at most" in said


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(lock.errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with locked(tmp_path):
        pass
    assert "no locks on this file system" in capsys.readouterr().err


def test_a_file_in_the_place_of_run_dir(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(TrainingError, match="a file stands where a directory is expected"),
        locked(tmp_path / "run"),
    ):
        pass
