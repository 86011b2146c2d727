"""A real SLURM on this machine for one test: a controller and two nodes of two ranks, with no GPUs behind them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .pool import free_port
from .processes import ONE_MACHINE, Processes

NODES = ("paralign-n1", "paralign-n2")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIG = """
ClusterName=paralign
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=30
SlurmdTimeout=10
SchedulerParameters=requeue_delay=1,batch_sched_delay=1,sched_interval=2
GresTypes=gpu
PartitionName=gpu Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Up from its making on; a context manager that ends all of it, jobs too. Needs root.

    Args:
        directory: of its configuration, state and logs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes = Processes(directory / "log")
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf"), **ONE_MACHINE}
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    @staticmethod
    def is_possible() -> bool:
        return os.geteuid() == 0 and all(shutil.which(name, path=_path()) for name in DAEMONS)

    def __enter__(self) -> Cluster:
        host = socket.gethostname().split(".")[0]
        config = CONFIG.format(dir=self.directory, host=host, port=free_port(), nodes=",".join(NODES))
        for name in NODES:
            config += (
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
                "CPUs=4 RealMemory=8000 Gres=gpu:2\n"
            )
        (self.directory / "slurm.conf").write_text(config)
        (self.directory / "gres.conf").write_text(
            f"NodeName={','.join(NODES)} Name=gpu File={self.directory}/gpu[0-1]\n"
        )
        for i in range(2):
            (self.directory / f"gpu{i}").touch()
        (self.directory / "state").mkdir()
        hosts = Path("/etc/hosts")
        if NODES[0] not in hosts.read_text():
            hosts.write_text(f"{hosts.read_text()}127.0.0.1 {' '.join(NODES)}\n")
        key = self.directory / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self._daemon(
            "munged",
            *("--foreground", "--force", f"--key-file={key}", f"--socket={self.directory}/munge.socket"),
            *(f"--{what}-file={self.directory}/munge.{what}" for what in ("pid", "seed", "log")),
        )
        self.processes.wait_until((self.directory / "munge.socket").exists, 20)
        self._daemon("slurmctld", "-D", "-c")
        for name in NODES:
            self.bring_up(name)
        self.processes.wait_until(lambda: self.states() == ["idle"] * len(NODES), 60)
        return self

    def __exit__(self, *error: object) -> None:
        self.processes.__exit__(*error)

    def bring_up(self, node: str) -> None:
        """Start a node's daemon."""
        self._nodes[node] = self._daemon("slurmd", "-D", "-N", node)

    def take_down(self, node: str) -> None:
        """What a power cut does to a node: all of its processes are gone at once."""
        self._nodes[node].kill()
        for pid in self.processes.alive():
            with suppress(OSError):
                if f"SLURMD_NODENAME={node}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    stepd = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                    os.kill(stepd, signal.SIGKILL)
                    os.kill(pid, signal.SIGKILL)

    def ranks(self) -> int:
        """Of jobs, alive now."""
        return sum("paralign.engine.run " in command for command in self.processes.alive().values())

    def states(self) -> list[str]:
        """Of the nodes."""
        return self.said("sinfo", "--noheader", "--Node", "--format=%t").split()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.said("scontrol", "show", "job", job_id)))

    def wait_for(
        self, job_id: str, moment: Callable[[dict[str, str]], bool], seconds: float
    ) -> dict[str, str]:
        """The job when that has come; AssertionError with its last lines where it does not."""
        deadline = time.monotonic() + seconds
        while not moment(job := self.job(job_id)):
            log = Path(job.get("StdOut", "/dev/null"))
            told = log.read_text()[-3000:] if log.exists() else ""
            assert time.monotonic() < deadline, f"{job}\n{told}\n{self.processes.log.read_text()[-3000:]}"
            time.sleep(0.5)
        return job

    def said(self, *command: str) -> str:
        """What a command of SLURM prints."""
        return subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60
        ).stdout

    def _daemon(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = shutil.which(name, path=_path())
        assert command is not None
        return self.processes.start([command, *arguments], **self.environment)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
