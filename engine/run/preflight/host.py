"""What a rank knows of its node: name, memory, versions, clock."""

from __future__ import annotations

import os
import platform
import re
import socket
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from paralign import __version__

_CLOCK_ROUNDS = 5


@dataclass(frozen=True)
class Host:
    """A rank's node.

    Attributes:
        name, local_rank: which node, and which of its ranks.
        device: name of the GPU, or of the processor.
        device_id: of the one GPU, or "" on a processor, which ranks share.
        versions: of all that must be the same everywhere, by name.
        memory: bytes of the host's memory that are free for programs, and in all.
        clock: seconds since 1970 at moments that all ranks reach together.
    """

    name: str
    local_rank: int
    device: str
    device_id: str
    versions: dict[str, str]
    memory: tuple[int, int]
    clock: tuple[float, ...]


def look(local_rank: int, device: torch.device) -> Host:
    """This rank's. Collective: clocks are read when all ranks leave a barrier."""
    clock = []
    for _ in range(_CLOCK_ROUNDS):
        dist.barrier()
        clock.append(time.time())
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return Host(
        name=socket.gethostname(),
        local_rank=local_rank,
        device=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        device_id=str(getattr(properties, "uuid", "")),
        versions=_versions(),
        memory=_memory(),
        clock=tuple(clock),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "paralign": __version__}
    for package in ("torch", "megatron-core", "numpy", "transformers"):
        found[package] = version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists() and (number := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", driver.read_text())):
        found["driver"] = number[1]
    return found


def _memory() -> tuple[int, int]:
    try:
        fields = dict(
            line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
        )
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):  # no Linux
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return whole, whole


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
