"""Work beside this process's own: in a child, which ends with it and whose end is known at once, or in a thread."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_on_linux = sys.platform == "linux"
_prctl = ctypes.CDLL(None).prctl if _on_linux else None  # here: nothing is loaded after a fork


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when the one that started it ends, however that ends.

    Linux means the *thread* that started it: fork from one that stays, such as the main one.

    Args:
        parent: process id of who started this one; where that is gone already, this process ends here.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


class ChildDied(Exception):
    """A child ended without a word; `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Child(Generic[T]):
    """`work` in a process of its own, forked at once; to be made in a thread that stays.

    What the signal mask blocks here is blocked there. The child starts no thread, and touches no GPU: nor does it
    collect garbage of this process, among it pinned memory, which is not freed without the driver.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        context = multiprocessing.get_context("fork")
        self._answer, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_answering, args=(work, theirs, self._answer, os.getpid()))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def running(self) -> bool:
        """Whether neither an answer nor the child's end has come."""
        return not self._answer.poll()

    def kill(self) -> None:
        """End the child; its answer is not wanted any more."""
        self._process.kill()
        self._process.join()
        self._answer.close()

    def result(self) -> T:
        """What `work` returned; waits for it.

        Raises:
            ChildDied: the child was killed.
            Exception: what `work` raised.
        """
        try:
            raised, answer = self._answer.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            raise ChildDied(
                f"ended by signal {-code}, which the kernel sends where memory runs out"
                if code == -signal.SIGKILL
                else f"ended by signal {-code}"
                if code < 0
                else f"ended with exit code {code}"
            ) from None
        finally:
            self._answer.close()
        self._process.join()
        if raised:
            raise answer
        return answer


class InThread(Generic[T]):
    """The same of a thread in this process, for who waits anyway: it shares the memory, and cannot be ended."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(work)

    def running(self) -> bool:
        """See Child."""
        return not self._future.done()

    def kill(self) -> None:
        """Nobody waits for it any more; its answer is not wanted."""
        self._pool.shutdown(wait=False)

    def result(self) -> T:
        """What `work` returned, or Exception: what it raised. Waits for it."""
        self._pool.shutdown()
        return self._future.result()


def _answering(work: Callable[[], Any], answer: Connection, theirs: Connection, parent: int) -> None:
    die_with_parent(parent)
    gc.disable()
    theirs.close()
    try:
        found = (False, work())
    except Exception as error:
        found = (True, error)
    answer.send(found)
    answer.close()
