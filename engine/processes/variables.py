"""Environment variables that CUDA, NCCL and gloo read once, when they start: a rank sets those that are missing.

What the user has set stays. docs/running.md has them all; one that torch reads is set in run/__main__.py.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

from paralign.models.errors import TrainingError

from .launch import RankEnv

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = 10  # compute capability
_DRIVER = Path("/dev/nvidiactl")


def set_before_cuda(rank: int, run_dir: Path, *, tensor_parallel: bool) -> str:
    """NCCL's log goes to run_dir, a file for each process, if NCCL_DEBUG asks for one. Kernels start in the order in
    which they are launched where megatron-core relies on it: with tensor parallelism, on GPUs before Blackwell.

    Returns:
        What the user is to hear, or "".
    """
    if os.environ.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE") and "NCCL_DEBUG_FILE" not in os.environ:
        directory = run_dir / "nccl"
        directory.mkdir(parents=True, exist_ok=True)
        path = str(directory / f"rank_{rank:05d}").replace("%", "%%")
        os.environ["NCCL_DEBUG_FILE"] = f"{path}.%h.%p.txt"  # host and process: a second start keeps both
    if not (tensor_parallel and 0 < _compute_capability() < _BLACKWELL):
        return ""
    number = os.environ.setdefault(_CONNECTIONS, "1")
    if number == "1":
        return ""
    return (
        f"{_CONNECTIONS}={number} stays as it was set; on these GPUs only 1 has tensor-parallel collectives overlap "
        "with matrix products"
    )


def check_interface(env: RankEnv) -> None:
    """gloo takes the address of the host's name; where that is the loopback, other nodes wait for ever.

    Raises:
        TrainingError: it is, there are other nodes, and no interface is set.
    """
    here, nodes = os.environ.get("LOCAL_WORLD_SIZE", ""), os.environ.get("SLURM_NNODES", "1")
    several_nodes = int(here) < env.world_size if here.isdecimal() else nodes != "1"
    if env.world_size == 1 or not several_nodes or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "no address"
    if address.startswith("127.") or address == "no address":
        raise TrainingError(
            f"rank {env.rank}: the name of this host, {name}, gives {address}, and gloo would bind to it; set "
            "GLOO_SOCKET_IFNAME to the interface between the nodes on all of them, such as eth0"
        )


def _compute_capability() -> int:
    """The major number, of this machine's first GPU; 0 without one. Asks the driver, and does not start CUDA.

    Some containers have the driver without NVML. A GPU there counts as an old one, 1.
    """
    unknown = int(_DRIVER.exists())
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return unknown
    gpu, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(gpu))
        or nvml.nvmlDeviceGetCudaComputeCapability(gpu, ctypes.byref(major), ctypes.byref(minor))
    )
    return unknown if failed else major.value
