"""Requests to stop: before, during and after the work, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paralign.engine.processes.stop import EXIT_STOPPED

HEADER = """\
import atexit, os, sys, time
from multiprocessing import get_context, resource_tracker
from paralign.engine.processes.stop import Stop

def ready():
    print("ready", flush=True)

def wait_for_a_word(connection):
    connection.recv()

"""
START_UP = """\
stop = Stop().hear()
ready()
time.sleep(30)
"""
DEFERRED = """\
if __name__ == "__main__":
    stop = Stop().hear()
    stop.defer()
    helpers = []
    for how in ("fork", "spawn", "forkserver"):
        ours, theirs = get_context(how).Pipe()
        process = get_context(how).Process(target=wait_for_a_word, args=(theirs,))
        process.start()
        helpers.append((process, ours))
    ready()
    while not stop.asked:
        time.sleep(0.01)
    time.sleep(0.2)
    assert all(process.is_alive() for process, _ in helpers)
    os.kill(resource_tracker._resource_tracker._pid, 0)
    for process, ours in helpers:
        ours.send("go")
        process.join()
    sys.exit(7)
"""
AT_THE_END = """\
stop = Stop().hear()
stop.defer()
atexit.register(time.sleep, 2)
ready()
"""
AFTERWARDS = """\
with Stop():
    pass
ready()
time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("body", "code"),
    [(START_UP, EXIT_STOPPED), (DEFERRED, 7), (AT_THE_END, 0), (AFTERWARDS, None)],
    ids=[
        "in start-up it ends",
        "later it is noted and helpers live",
        "at the end nothing",
        "after it as before",
    ],
)
def test_a_request_to_the_group(body: str, code: int | None, number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(HEADER + body)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        os.killpg(process.pid, number)
        assert process.wait(20) == (-number if code is None else code)
