"""Real processes of a test: started with a mark that all they start inherit, so that none is left unseen."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from paralign.engine.processes.child import die_with_parent

ONE_MACHINE = {
    "GLOO_SOCKET_IFNAME": "lo"
}  # for agents that stand for nodes: the host's name may be the loopback
MARK = "PARALIGN_TEST_MARK"


class Processes:
    """Starts commands whose output goes to `log`; as a context manager it ends what is left of them."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        """A process in a session of its own."""
        with self.log.open("ab") as log:
            self.started.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ
                    | {MARK: self.mark, "TORCH_CPP_LOG_LEVEL": "ERROR"}
                    | ONE_MACHINE
                    | environment,
                    start_new_session=True,
                    preexec_fn=die_with_parent,  # where a test is ended from outside
                )
            )
        return self.started[-1]

    def torchrun(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """An agent of torchrun."""
        return self.start([sys.executable, "-m", "torch.distributed.run", *arguments], **environment)

    def alive(self) -> dict[int, str]:
        """Command lines of all that is alive, by process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes()
                if ours and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it has ended meanwhile
                continue
        return found

    def ranks(self, of: int | None = None) -> dict[int, int]:
        """Process ids by rank; those that process `of` has started."""
        started = self._started_ranks()
        return {
            rank: pid
            for pid, rank in started.items()
            if _parent(pid) not in started and (of is None or _parent(pid) == of)
        }

    def writers(self) -> list[int]:
        """Process ids of what ranks have forked: each has the command line of the rank."""
        started = self._started_ranks()
        return [pid for pid in started if _parent(pid) in started]

    def _started_ranks(self) -> dict[int, int]:
        """Ranks by process id, with what they forked."""
        found = {}
        for pid, command in self.alive().items():
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
                rank = re.search(r"(?:^|\0)RANK=(\d+)", environment)
                if rank and re.search(r"-m paralign\.engine\.run ", command):
                    found[pid] = int(rank[1])
        return found

    def wait_until(self, moment: Callable[[], bool], seconds: float = 120, pause: float = 0.05) -> None:
        """Raises AssertionError, with the end of the log, where the moment does not come."""
        deadline = time.monotonic() + seconds
        while not moment():
            assert time.monotonic() < deadline, f"it did not come as far:\n{self.log.read_text()[-4000:]}"
            time.sleep(pause)

    def left(self, seconds: float = 5) -> list[str]:
        """Command lines of what is alive still after so long."""
        deadline = time.monotonic() + seconds
        while (found := list(self.alive().values())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended meanwhile
        return 0
