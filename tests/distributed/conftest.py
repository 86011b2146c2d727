"""One pool of forked ranks for all distributed tests of a run, and the certificate as a table at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from .pool import RankPool

if TYPE_CHECKING:
    from .certificate import Row

TABLE = pytest.StashKey[list[tuple[str, "Row"]]]()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    torch.set_num_threads(1)
    with RankPool(8) as pool:
        yield pool


@pytest.fixture
def certificate_table(request: pytest.FixtureRequest) -> list[tuple[str, Row]]:
    """Rows for the table that the run ends with."""
    return request.config.stash.setdefault(TABLE, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash.get(TABLE, [])
    if not rows:
        return
    terminalreporter.section(
        "layout certificate: relative errors against transformers, unpacked, one process"
    )
    width = max(len(name) for name, _ in rows)
    terminalreporter.write_line(f"{'':{width}}     loss  gradient  grad norm  loss, 3 steps")
    for name, row in rows:
        terminalreporter.write_line(
            f"{name:{width}}  {row.loss:.1e}   {row.gradient:.1e}    {row.grad_norm:.1e}        {row.loss_after:.1e}"
        )
