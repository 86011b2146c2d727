"""Many directories that no program has written: one clear error within seconds, never a traceback, never a hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..strange import trials, write_models


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_strange_directory_ends_in_a_traceback_or_hangs(tmp_path: Path) -> None:
    found = list(trials(write_models(tmp_path / "models"), tmp_path, seed=2, n=400))
    assert [(done, faults) for done, faults in found if faults] == []
