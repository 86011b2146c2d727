"""A library that the device or its driver refuses is found before anything is launched on it in earnest."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paralign.engine.backends import backend_of, check_kernels
from paralign.engine.backends.ours import Ours
from paralign.engine.config.model import ModelConfig
from paralign.engine.kernels import library
from paralign.engine.kernels.library import KernelLibrary, built_library, find_library
from paralign.models import arch_from_hf
from paralign.models.errors import RecipeError

from ..tiny import config_keys

REQUIRED = ModelConfig(hf=Path(), dtype="bf16", kernels="required")


@pytest.fixture
def device(cpu_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The kernels for the CPU as if they were built for a GPU, and the stand-in for that GPU."""
    cpu_library.path.with_suffix(".json").write_text('{"architectures": ["sm_90", "PTX 90"]}')
    monkeypatch.setattr(library, "LIBRARY", cpu_library.path)
    monkeypatch.setattr(library, "sources_digest", lambda: cpu_library.sources)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    find_library.cache_clear()
    stand_in = ctypes.CDLL(str(cpu_library.path))
    yield stand_in
    stand_in.on_cpu_has_code(1)
    find_library.cache_clear()


def test_a_library_that_the_device_runs(device: ctypes.CDLL) -> None:
    found = find_library()
    assert found.library is not None
    assert found.reason == ""
    backend_of(REQUIRED)


def test_a_library_that_the_device_refuses(device: ctypes.CDLL) -> None:
    """`auto` falls back and says why, `required` says what to do; who trains nothing opens no context for it."""
    device.on_cpu_has_code(0)
    refused = (
        "built, but this GPU and its driver refuse them (kernel trial: no kernel image is available for execution on "
        "the device); run `paralign kernels build --arch sm_86`, with an nvcc that is no newer than the driver's CUDA"
    )
    assert find_library().library is None
    assert not Ours("auto").fuses_updates
    facts = Ours("auto").facts(arch_from_hf(config_keys()), torch.device("cpu"), torch.float32)
    assert facts["kernels"] == f"torch ({refused})"
    with pytest.raises(RecipeError) as raised:
        backend_of(REQUIRED)
    assert str(raised.value) == f"model.kernels: required, but they are {refused}; or set it to auto"
    check_kernels(REQUIRED)
    assert built_library().library is not None
