"""Where operations run: on the CPU their definitions, on a GPU their kernels."""

from __future__ import annotations

import pytest
import torch

from paralign.engine.kernels.library import find_library


def _kernels() -> torch.device:
    found = find_library()
    if found.library is None:
        pytest.skip(f"the kernels are {found.reason}")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return _kernels() if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def gpu() -> torch.device:
    return _kernels()
