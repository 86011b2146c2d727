"""Signals that ask a run to stop: when they are heard, and by whom. What is saved then is the trainer's.

torchrun and SLURM signal whole process groups: this process and all that it has started, such as the writers of a
checkpoint or what tokenises. So both signals are blocked from the first moment. Every thread and every process that
is started later inherits that, and none of them dies in the midst of its work. One thread waits for the signals.

Imports nothing heavy: it is to stand before the seconds of importing torch.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL: what was done is saved; start it again
STOPPED = "PARALIGN_STOPPED"  # environment: a file in which rank 0 names the signal that stopped the run
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # torchrun and SLURM; SLURM's warning before the time limit


class Stop:
    """Whether somebody asked this process to stop; hears the signals from `hear()` on, or as a context manager.

    A request ends the process at once, with EXIT_STOPPED: in start-up there is nothing to save, and ranks may wait
    for each other for hours. After `defer()` it is only noted.

    Attributes:
        signal: the one that asked, here or, once ranks have agreed, anywhere; 0 before. Of two the larger: SIGTERM
            ends a run for good, SIGUSR1 lets it go on later.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._deferred = False
        self._left = False

    def hear(self) -> Stop:
        """Block both signals and wait for them, to the end of the process unless this is a `with`."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        # multiprocessing starts this helper at some time; it is to inherit the mask. Its start ends with SIGTERM no
        # longer blocked here, and handlers bridge the moment until it is again.
        self._handlers = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self._thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __enter__(self) -> Stop:
        return self.hear()

    def __exit__(self, *error: object) -> None:
        self._left = True
        signal.pthread_kill(self._thread.ident or 0, signal.SIGUSR1)
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signal != 0

    def tell(self) -> None:
        """Leave word of the signal for whoever started the run: a batch script decides by it. For rank 0."""
        if path := os.environ.get(STOPPED):
            Path(path).write_text(signal.Signals(self.signal).name)

    def defer(self) -> None:
        """From now on a request is noted, and somebody looks at `asked`."""
        self._deferred = True

    def _listen(self) -> None:
        while True:
            number = signal.sigwait(STOP_SIGNALS)
            if self._left:
                return
            self._ask(number)

    def _ask(self, number: int, frame: FrameType | None = None) -> Any:
        del frame
        self.signal = max(self.signal, number)
        if self._deferred:
            return
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            name = signal.Signals(number).name
            with suppress(OSError):
                self.tell()
            # Not through sys.stderr: another thread may hold its lock, and this one ends the process.
            os.write(2, f"{name} in start-up: stopped, nothing is saved\n".encode())
        os._exit(EXIT_STOPPED)
