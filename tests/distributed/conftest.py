"""One pool of forked ranks for all distributed tests of a run, and the certificate as a table at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .pool import RankPool

TABLE = pytest.StashKey[list[tuple[str, Any]]]()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    torch.set_num_threads(1)
    with RankPool(8) as pool:
        yield pool


@pytest.fixture
def certificate_table(request: pytest.FixtureRequest) -> list[tuple[str, Any]]:
    """Names and rows of errors, for the table that the run ends with."""
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
        errors = [getattr(row, what, None) for what in ("loss", "gradient", "grad_norm", "loss_after")]
        cells = ["—" if error is None else f"{error:.1e}" for error in errors]
        terminalreporter.write_line(
            f"{name:{width}}  {cells[0]}   {cells[1]}    {cells[2]:>7}        {cells[3]:>7}"
        )
