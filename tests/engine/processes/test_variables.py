"""Variables of CUDA, NCCL and gloo: what a rank sets, when, and what it leaves as the user set it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paralign.engine.processes import variables
from paralign.engine.processes.launch import RankEnv
from paralign.engine.processes.variables import check_interface, set_before_cuda
from paralign.models.errors import TrainingError


def _on_gpus_of(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variables, "_compute_capability", lambda: capability)
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_DEBUG", "NCCL_DEBUG_FILE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("capability", "tensor_parallel", "expected"),
    [
        (9, True, "1"),
        (8, True, "1"),
        (9, False, None),  # gradients are reduced beside the backward pass: more queues help
        (10, True, None),  # Blackwell: megatron-core no longer relies on it
        (0, True, None),  # no GPU
    ],
)
def test_kernels_start_in_order_where_megatron_relies_on_it(
    capability: int,
    tensor_parallel: bool,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _on_gpus_of(capability, monkeypatch)
    assert not set_before_cuda(0, tmp_path, tensor_parallel=tensor_parallel)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_that_cannot_be_asked_counts_as_an_old_one(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that has the driver without NVML."""

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(variables.ctypes, "CDLL", missing)
    monkeypatch.setattr(variables, "_DRIVER", tmp_path if there else tmp_path / "nothing")
    set_before_cuda(0, tmp_path, tensor_parallel=True)
    assert os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None) == ("1" if there else None)


def test_a_number_of_the_users_stays_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_gpus_of(9, monkeypatch)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    said = set_before_cuda(0, tmp_path, tensor_parallel=True)
    assert "CUDA_DEVICE_MAX_CONNECTIONS=32 stays" in said
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert not set_before_cuda(0, tmp_path, tensor_parallel=False)


def test_the_log_of_nccl_goes_to_a_file_of_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_gpus_of(0, monkeypatch)
    run_dir = tmp_path / "100%"
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    set_before_cuda(3, run_dir, tensor_parallel=False)
    assert "NCCL_DEBUG_FILE" not in os.environ, "a warning is for the terminal"
    monkeypatch.setenv("NCCL_DEBUG", "info")
    set_before_cuda(3, run_dir, tensor_parallel=False)
    assert os.environ["NCCL_DEBUG_FILE"] == f"{tmp_path}/100%%/nccl/rank_00003.%h.%p.txt"
    assert (run_dir / "nccl").is_dir()
    set_before_cuda(4, tmp_path / "other", tensor_parallel=False)
    assert "rank_00003" in os.environ["NCCL_DEBUG_FILE"], "what is set stays"


@pytest.mark.parametrize("variable", [{"LOCAL_WORLD_SIZE": "2"}, {"SLURM_NNODES": "2"}])
def test_a_host_whose_name_is_the_loopback_is_refused_before_gloo_waits(
    variable: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NNODES", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(variables.socket, "gethostbyname", lambda name: "127.0.1.1")
    check_interface(RankEnv(0, 0, 4, "host:1"))  # one node
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    check_interface(RankEnv(0, 0, 1, "host:1"))  # one process, whatever the job has besides
    with pytest.raises(
        TrainingError, match=r"gives 127\.0\.1\.1, and gloo would bind to it; set GLOO_SOCKET_IFNAME"
    ):
        check_interface(RankEnv(0, 0, 4, "host:1"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_interface(RankEnv(0, 0, 4, "host:1"))
