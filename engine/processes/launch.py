"""Processes of a run: starts local ranks and ends them together; reads which rank this is. Trains nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

from paralign.models.errors import TrainingError

from .child import die_with_parent
from .stop import STOP_SIGNALS

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class RankEnv:
    """Which process of a run this is.

    Attributes:
        rank, world_size: among all processes of the run.
        local_rank: among the processes of this node; its GPU.
        master: `host:port` where the ranks meet.
    """

    rank: int
    local_rank: int
    world_size: int
    master: str

    def tell_torch(self) -> None:
        """Sets the environment variables by which torch's process group finds the other ranks."""
        host, port = self.master.rsplit(":", 1)
        os.environ.update(
            MASTER_ADDR=host, MASTER_PORT=port, RANK=str(self.rank), WORLD_SIZE=str(self.world_size)
        )


def rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnv:
    """Reads torchrun's variables, else srun's, else is a single process.

    srun is known by SLURM_STEP_ID: a batch script has the other variables too, and is not one of its ranks.
    Raises TrainingError where a variable is missing or no number.
    """

    def number(name: str) -> int:
        value = environ.get(name, "")
        if not value.isdecimal():
            read = f'read "{value}"' if value else "not set"
            raise TrainingError(
                f"environment variable {name}: {read}; expected a number, as torchrun and srun set"
            )
        return int(value)

    if "RANK" in environ:
        master = f"{environ.get('MASTER_ADDR', '127.0.0.1')}:{number('MASTER_PORT')}"
        return RankEnv(number("RANK"), number("LOCAL_RANK"), number("WORLD_SIZE"), master)
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST") or "127.0.0.1"
        # The same on every rank, below the ephemeral ports, and seldom the same for two jobs on a node.
        port = 15000 + number("SLURM_JOB_ID") % 15000
        return RankEnv(
            number("SLURM_PROCID"),
            number("SLURM_LOCALID"),
            number("SLURM_NTASKS"),
            f"{first_host(nodes)}:{port}",
        )
    return RankEnv(0, 0, 1, f"127.0.0.1:{_free_port()}")


def first_host(nodes: str) -> str:
    """The first name in SLURM's notation: `gpu[003-005,9],login` is gpu003."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def run_local(
    recipe: Path,
    overrides: Sequence[str],
    nproc: int,
    *,
    module: str = "paralign.engine.run",
    grace_seconds: float = 5.0,
) -> int:
    """Runs `python -m MODULE RECIPE key=value …` as `nproc` ranks on this machine and waits for them all.

    Rank 0 writes to this terminal; of the others only stderr is shown, each line behind `[rank N]`. When a
    rank fails, or this process gets SIGINT or SIGHUP, every rank gets SIGTERM and, after `grace_seconds`,
    SIGKILL. SIGTERM and SIGUSR1 ask the ranks to save and stop, however long that takes; a second signal ends
    them. If this process itself is killed, Linux kills the ranks.

    Returns:
        0, or the exit code of the rank that failed first; 128 + N after signal N.
    """
    shared = {
        **os.environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    shared.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d prints stacks where a rank is merely gone
    shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    command = [sys.executable, "-m", module, str(recipe), *overrides]
    ranks: list[subprocess.Popen[str]] = []
    with _caught_signals() as caught:
        try:
            for rank in range(nproc):
                ranks.append(_start(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, rank))
            for rank, process in enumerate(ranks):  # after the last fork: a thread and a fork do not mix
                if process.stderr:
                    Thread(target=_echo, args=(process.stderr, f"[rank {rank}] "), daemon=True).start()
            return _wait(ranks, caught)
        finally:
            _stop(ranks, grace_seconds)


def _start(command: list[str], environ: Mapping[str, str], rank: int) -> subprocess.Popen[str]:
    quiet = rank > 0
    return subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        errors="replace",
        # A session of its own: Ctrl-C reaches the ranks through this process, once, and a rank's workers
        # can be ended with it.
        start_new_session=True,
        preexec_fn=_before_python(),
    )


def _before_python() -> Callable[[], None]:
    """What a rank does first: it keeps signals until it can hear them, and dies with this process on Linux."""
    parent = os.getpid()

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        die_with_parent(parent)

    return in_child


def _echo(stream: IO[str], prefix: str) -> None:
    for line in stream:
        sys.stderr.write(f"{prefix}{line.rstrip()}\n")


def _wait(ranks: list[subprocess.Popen[str]], caught: list[int]) -> int:
    asked = False
    while not caught or (not asked and caught[0] in STOP_SIGNALS):
        if caught:
            asked, number = True, signal.Signals(caught.pop())
            print(f"{number.name}: the ranks save and stop", file=sys.stderr)
            for process in ranks:
                process.send_signal(number)
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                others = "; stopping the others" if len(ranks) > 1 else ""
                print(f"rank {rank} {ended}{others}", file=sys.stderr)
                return 128 - code if code < 0 else code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)
    print(f"{signal.Signals(caught[0]).name}: stopping all ranks", file=sys.stderr)
    return 128 + caught[0]


def _stop(ranks: list[subprocess.Popen[str]], grace_seconds: float) -> None:
    deadline = time.monotonic() + grace_seconds
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for process in ranks:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a rank left behind: data workers, a saver
        process.wait()


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collects what would end this process, so that the ranks are ended first."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: caught.append(number))
        for number in (signal.SIGINT, signal.SIGHUP, *STOP_SIGNALS)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
