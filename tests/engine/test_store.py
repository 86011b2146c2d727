"""Directories of checkpoints: which are complete, which stay, what the tracker says."""

from __future__ import annotations

from pathlib import Path

import pytest

from paralign.engine.checkpoint import store
from paralign.engine.checkpoint.config import CheckpointConfig
from paralign.engine.checkpoint.store import Progress
from paralign.models.errors import CheckpointError


def _save(root: Path, step: int, **metrics: float) -> Path:
    directory = store.directory_of(root, step)
    store.unfinished(directory).mkdir(parents=True)
    store.write_progress(store.unfinished(directory), Progress(step, "data", metrics))
    store.publish(directory)
    return directory


def test_what_is_published_is_complete_and_tracked(tmp_path: Path) -> None:
    assert store.latest(tmp_path / "absent") is None
    _save(tmp_path, 5)
    newest = _save(tmp_path, 10)
    store.unfinished(store.directory_of(tmp_path, 15)).mkdir()
    assert store.latest(tmp_path) == newest
    assert store.latest(tmp_path, at_most=9) == store.directory_of(tmp_path, 5)
    assert (tmp_path / store.TRACKER).read_text() == "10\n"
    assert store.passed_over(tmp_path) == ["iter_0000015.part"]
    assert store.read_progress(newest) == Progress(10, "data", {})


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path, 5, loss=1.0)
    again = _save(tmp_path, 5, loss=2.0)
    assert store.read_progress(again).metrics == {"loss": 2.0}


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({}, [1, 2, 3, 4]),
        ({"keep_last": 2}, [3, 4]),
        ({"keep_last": 1, "keep_best": "validation/chat/loss"}, [2, 4]),
        ({"keep_last": 1, "keep_best": "validation/other/loss"}, [4]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path: Path, config: dict[str, object], kept: list[int]) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 4.0)):
        _save(tmp_path, step, **{"validation/chat/loss": loss})
    store.rotate(tmp_path, CheckpointConfig(**config))
    assert store.complete(tmp_path) == [store.directory_of(tmp_path, step) for step in kept]
    assert store.passed_over(tmp_path) == []


def test_a_directory_without_progress_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000007").mkdir()
    assert store.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="expected a finished checkpoint"):
        store.read_progress(tmp_path / "iter_0000007")
