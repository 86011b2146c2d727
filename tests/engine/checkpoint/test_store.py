"""Directories of checkpoints: which are complete, which stay, what the tracker says."""

from __future__ import annotations

import os
import shutil
import signal
import sys
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
    assert store.complete(tmp_path, at_most=9)[-1] == store.directory_of(tmp_path, 5)
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
    for step, loss in ((1, float("nan")), (2, 1.0), (3, 2.0), (4, 4.0)):
        _save(tmp_path, step, **{"validation/chat/loss": loss})
    store.rotate(tmp_path, CheckpointConfig(**config))
    assert store.complete(tmp_path) == [store.directory_of(tmp_path, step) for step in kept]
    assert store.passed_over(tmp_path) == []


def test_rotation_takes_its_own_and_no_other(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    elsewhere = tmp_path / "large disk"
    store.directory_of(tmp_path, 1).rename(elsewhere)
    store.directory_of(tmp_path, 1).symlink_to(elsewhere)
    (tmp_path / ".iter_0000001.swp").touch()
    for name in (".iter_0000001.mine", "iter_0000002.old", ".iter_0000009.removed", ".iter_0000003.aside"):
        (tmp_path / name).mkdir()
    store.rotate(tmp_path, CheckpointConfig(keep_last=1))
    left = {path.name for path in tmp_path.iterdir()} - {store.TRACKER, "large disk"}
    assert left == {"iter_0000003", ".iter_0000001.swp", ".iter_0000001.mine", "iter_0000002.old"}
    assert (elsewhere / store.PROGRESS).is_file()


def test_a_directory_without_progress_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000007").mkdir()
    assert store.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="expected a finished checkpoint"):
        store.read_progress(tmp_path / "iter_0000007")


def _die_at(n: int, root: Path) -> int:
    """Save step 5 again in a process that is killed before its n-th change on the disk; its exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        done = iter(range(1, n))
        real = os.fsync

        def change(event: str, arguments: object = None) -> None:
            if event in DISK_EVENTS and next(done, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(descriptor: int) -> None:
            change("os.fsync")
            real(descriptor)

        os.fsync = fsync  # of all these only fsync tells no audit hook
        sys.addaudithook(change)
        _save(root, 5, loss=2.0)
        store.rotate(root, CheckpointConfig(keep_last=1))
        os._exit(0)
    except BaseException:
        os._exit(1)


DISK_EVENTS = {"open", "os.fsync", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def test_killed_at_any_operation_a_complete_checkpoint_is_there(tmp_path: Path) -> None:
    for n in range(1, 1000):
        root = tmp_path / str(n)
        _save(root, 3, loss=0.5)
        before = _save(root, 5, loss=1.0)
        (before / "weights").write_text("whole")
        status = _die_at(n, root)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, f"operation {n}"
        left = store.latest(root)
        assert left is not None, f"operation {n}"
        progress = store.read_progress(left)
        assert progress.step == 5, f"operation {n}"
        assert progress.metrics["loss"] == 2.0 or (left / "weights").read_text() == "whole", f"operation {n}"
        if n % 2:  # the next run saves that step again, after a second kill
            _die_at(n // 2, root)
            assert store.latest(root) is not None, f"operations {n} and {n // 2}"
            shutil.rmtree(store.unfinished(store.directory_of(root, 5)), ignore_errors=True)
            newest = _save(root, 5, loss=3.0)
        else:  # or another one
            newest = _save(root, 10, loss=3.0)
        store.rotate(root, CheckpointConfig(keep_last=1))
        assert store.complete(root) == [newest]
        assert store.read_progress(newest).metrics == {"loss": 3.0}
        assert not list(root.glob(".iter*"))
    assert n > 15  # it was killed in the writing, the two renames, the tracker and both removals


def test_one_set_aside_stays_until_the_newer_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where something without progress has the name: a checkpoint of Megatron's own, or a removal cut short."""
    _save(tmp_path, 5, loss=1.0).rename(tmp_path / ".iter_0000005.aside")
    directory = store.directory_of(tmp_path, 5)
    (directory / "hf").mkdir(parents=True)
    assert store.latest(tmp_path) == tmp_path / ".iter_0000005.aside"
    store.unfinished(directory).mkdir()
    store.write_progress(store.unfinished(directory), Progress(5, "data", {"loss": 2.0}))
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        assert store.latest(tmp_path) is not None
        replace(source, target)
        assert store.latest(tmp_path) is not None

    monkeypatch.setattr(os, "replace", watched)
    store.publish(directory)
    assert store.read_progress(directory).metrics == {"loss": 2.0}
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["iter_0000005", "iter_0000005.other", store.TRACKER]


def test_what_is_published_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        done.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    directory = store.directory_of(tmp_path, 5)
    partial = store.unfinished(directory)
    (partial / "hf").mkdir(parents=True)
    (partial / "hf/config.json").write_text("{}")
    (partial / "common.pt").write_text("")
    store.write_progress(partial, Progress(5, "data"))
    store.publish(directory)

    named = done.index(("replace", str(directory)))
    for path in (directory, *directory.rglob("*")):
        place = str(partial / path.relative_to(directory))
        assert ("fsync", place) in done[:named], place
    assert ("fsync", str(tmp_path)) in done[named:]
