"""Children: their answers, their ends, and that none outlives who started it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paralign.engine.processes.child import Child, ChildDied


def test_what_a_child_finds_comes_back() -> None:
    child = Child(lambda: {"pid": os.getpid()})
    assert child.result() == {"pid": child.pid}
    assert child.pid != os.getpid()


def test_what_a_child_raises_is_raised_here() -> None:
    with pytest.raises(OSError, match="no space left"):
        Child(lambda: (_ for _ in ()).throw(OSError(28, "no space left"))).result()


def test_a_child_that_is_killed_is_known_at_once_and_says_how() -> None:
    child: Child[None] = Child(lambda: time.sleep(60))
    assert child.running()
    os.kill(child.pid, signal.SIGKILL)
    began = time.monotonic()
    while child.running():
        assert time.monotonic() - began < 5
    with pytest.raises(ChildDied, match="ended by signal 9"):
        child.result()
    with pytest.raises(ChildDied, match="exit code 7"):
        Child(lambda: os._exit(7)).result()


def test_a_child_frees_nothing_that_this_process_has_left() -> None:
    freed: list[int] = []

    class Left:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append(os.getpid())

    def work() -> list[int]:
        kept = [[number] for number in range(100_000)]  # what has the collector look at all there is
        return freed[: len(kept)]

    gc.disable()
    try:
        Left()
        gc.enable()
        child = Child(work)
        assert child.pid not in child.result()
    finally:
        gc.enable()


def test_a_child_that_is_not_wanted_is_ended() -> None:
    child: Child[None] = Child(lambda: time.sleep(60))
    child.kill()
    assert not Path(f"/proc/{child.pid}").exists()


@pytest.mark.parametrize("mask", [False, True])
def test_no_child_outlives_a_parent_that_is_killed(mask: bool) -> None:
    script = (
        "import signal, sys, time\n"
        f"if {mask}: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])\n"
        "from paralign.engine.processes.child import Child\n"
        "print(Child(lambda: time.sleep(60)).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    _wait_until(lambda: _gone(child))


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
