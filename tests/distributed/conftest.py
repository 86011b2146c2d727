"""One pool of forked ranks for all distributed tests of a run."""

from collections.abc import Iterator

import pytest
import torch

from .pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    torch.set_num_threads(1)
    with RankPool(8) as pool:
        yield pool
