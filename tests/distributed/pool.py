"""A parent that imported everything once, and forked ranks that run one function after another.

Starting eight processes costs twenty seconds; a task on ranks that already run costs under one.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from paralign.engine.parallel.mesh import open_world
from paralign.engine.processes.child import die_with_parent

# Imported before the fork, so that no rank pays for it again.
from paralign.engine.training import build, optim, step  # noqa: F401

Task = Callable[..., Any]
# gloo's threads outlive their groups, some twenty a task on each rank; by the hundredth task they cost more than
# the work. Forking anew takes a tenth of a second.
TASKS_PER_FORK = 4


class RankFailure(AssertionError):
    """A task failed on some rank; the message holds the rank's traceback."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, connection: Connection) -> None:
    die_with_parent()  # where a test run is killed; the others hold this one's pipe open
    os.setsid()  # what a rank starts, such as the writers of a checkpoint, is to end with it
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        task, world_size, port, arguments = pickle.loads(message)
        try:
            store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
            with open_world(
                rank=rank, world_size=world_size, local_rank=rank, timeout_minutes=2, store=store
            ):
                answer = (True, task(rank, world_size, *arguments))
        except BaseException:  # the pool reports it
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


class RankPool:
    """Runs `task(rank, world_size, *arguments)` on the first ranks of the pool, with a process group open."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[tuple[Any, Connection]] = []
        self._tasks_done = 0

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()

    def _start(self) -> None:
        context = mp.get_context("fork")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=False)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def _kill(self) -> None:
        for process, connection in self.workers:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            connection.close()
        for process, _ in self.workers:
            process.join()
        self.workers = []
        self._tasks_done = 0

    def run(self, world_size: int, task: Task, *arguments: Any, timeout: float = 120) -> list[Any]:
        """Results by rank.

        Raises:
            RankFailure: a rank raised, died, or did not answer in `timeout` seconds; the pool starts anew.
        """
        if self._tasks_done >= TASKS_PER_FORK:
            self._kill()
        if not self.workers:
            self._start()
        self._tasks_done += 1
        message = pickle.dumps((task, world_size, free_port(), arguments))
        for _, connection in self.workers[:world_size]:
            connection.send_bytes(message)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        failed = 0.0
        deadline = time.monotonic() + timeout
        # A rank that died may be seen a moment later than those that missed it.
        while len(results) + len(failures) < world_size and (not failures or time.monotonic() < failed + 0.1):
            for rank, (process, connection) in enumerate(self.workers[:world_size]):
                if rank in results or rank in failures or not connection.poll(0.002):
                    continue
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process.join(5)  # its end may follow that of its pipe
                    ok, value = False, f"died with exit code {process.exitcode}"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
                    failed = time.monotonic()
            if time.monotonic() > deadline:
                silent = [rank for rank in range(world_size) if rank not in results]
                self._kill()
                raise RankFailure(f"ranks {silent} of {world_size} gave no answer in {timeout} s")
        if failures:
            # The first to fail is the cause; the others may wait for it in a collective.
            self._kill()
            raise RankFailure("\n".join(f"rank {rank}:\n{text}" for rank, text in failures.items()))
        return [results[rank] for rank in range(world_size)]
