"""What is said of a save that failed; the saving itself is tested in tests/distributed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paralign.engine.checkpoint import store
from paralign.engine.checkpoint.config import CheckpointConfig
from paralign.engine.checkpoint.hf import Assets
from paralign.engine.training.state import NativeCheckpoints
from paralign.models.errors import CheckpointError


def test_a_checkpoint_that_has_its_name_is_not_said_to_be_unwritten(tmp_path: Path) -> None:
    nothing: Any = SimpleNamespace(mesh=None)
    assets = Assets(tmp_path, tmp_path)
    saving = NativeCheckpoints(tmp_path, CheckpointConfig(), nothing, nothing, assets=assets, recipe="")
    full = OSError(28, "No space left on device")
    directory = store.directory_of(tmp_path, 2)
    store.unfinished(directory).mkdir(parents=True)
    store.write_progress(store.unfinished(directory), store.Progress(2, "data", {}))

    with (
        pytest.raises(
            CheckpointError, match=r"_0000002: could not .* device\), .*; there is none before it; mend"
        ),
        saving._naming(directory),
    ):
        raise full
    (tmp_path / store.TRACKER).mkdir()  # so that it cannot be replaced
    with pytest.raises(CheckpointError) as raised, saving._naming(directory):
        store.publish(directory)
    assert f"{directory}: is complete and stays, but what follows a save failed (" in str(raised.value)
    assert "could not be written" not in str(raised.value)
    with (
        pytest.raises(
            CheckpointError, match=r"_0000003: could not be .*_0000002 is complete and stays; mend"
        ),
        saving._naming(store.directory_of(tmp_path, 3)),
    ):
        raise full
