"""What disks do to a run's checkpoints: each kind of file in four ways, and the run goes on from an older one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from paralign.engine.checkpoint import store
from paralign.engine.data.packing import MIXED
from paralign.engine.parallel.mesh import Mesh
from paralign.engine.run.check import packing_of_run
from paralign.engine.training import resuming, saving
from paralign.engine.training.resuming import broken
from paralign.models.errors import CheckpointError

from .pool import RankFailure, RankPool
from .toy import forget_checksums, losses_of, make_toy, train_and_tell, train_recipe, write_recipe

STEPS = 12
HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "a bit flipped": lambda held: (
        held[: len(held) // 2] + bytes([held[len(held) // 2] ^ 4]) + held[len(held) // 2 + 1 :]
    ),
    "cut": lambda held: held[: len(held) // 2],
    "zeroes": lambda held: bytes(len(held)),
    "deleted": lambda held: None,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("broken")
    make_toy(directory)
    return directory


def _recipe(toy: Path, name: str, **changes: Any) -> Path:
    settings = {
        "train__max_steps": STEPS,
        "train__eval_every_steps": None,
        "checkpoint__save_every_steps": 4,
    }
    return write_recipe(toy, name, {"tensor_model_parallel_size": 2}, **(settings | changes))


@pytest.fixture(scope="module")
def saved(toy: Path, ranks: RankPool) -> Path:
    """A run that came to its end on two ranks."""
    ranks.run(2, train_recipe, _recipe(toy, "whole"))
    return toy / "whole"


def _mesh(rank: int, world_size: int) -> Mesh:
    """As much of one as a look at files asks for."""
    return Mesh(None, rank, world_size, torch.device("cpu"), {})  # type: ignore[arg-type]


def harmed_in_every_way(rank: int, world_size: int, directory: Path) -> dict[str, bool]:
    """For each file and harm whether it is found; the files are as before afterwards."""
    mesh, found = _mesh(rank, world_size), {}
    resuming.PAUSE_SECONDS = 0.0
    assert broken(directory, mesh) == []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        held = path.read_bytes()
        for harm, change in HARMS.items():
            dist.barrier()
            if rank == 0:
                path.unlink()
                if (changed := change(held)) is not None:
                    path.write_bytes(changed)
            dist.barrier()
            passed_over = directory not in store.complete(directory.parent)
            found[f"{path.relative_to(directory)}: {harm}"] = passed_over or bool(broken(directory, mesh))
            dist.barrier()
            if rank == 0:
                path.write_bytes(held)
    dist.barrier()
    assert broken(directory, mesh) == []
    return found


def test_no_file_of_a_checkpoint_is_harmed_in_silence(saved: Path, tmp_path: Path, ranks: RankPool) -> None:
    copy = tmp_path / "checkpoints" / "iter_0000004"
    shutil.copytree(saved / "checkpoints/iter_0000004", copy)
    for table in ranks.run(2, harmed_in_every_way, copy):
        assert len(table) >= 4 * 9  # weights of two ranks, .metadata, common.pt, progress, recipe, config, …
        assert [name for name, found in table.items() if not found] == []


def _flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    saved: Path, toy: Path, ranks: RankPool
) -> None:
    recipe, run_dir = _recipe(toy, "harmed"), toy / "harmed"
    shutil.copytree(saved / "checkpoints", run_dir / "checkpoints")
    _flip(run_dir / "checkpoints/iter_0000012/__1_0.distcp")
    (run_dir / "checkpoints/iter_0000008/manifest.json").unlink()
    said, _ = ranks.run(2, train_and_tell, recipe)
    assert "resumedfrom" in said
    assert "iter_0000012(__1_0.distcp:othercontent)" in said
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert {"iter_0000012.broken", "iter_0000008.broken", "iter_0000012", "iter_0000008"} <= names
    assert {step: losses_of(saved)[step] for step in range(4, STEPS)} == losses_of(run_dir)

    for step in (4, 8, 12):
        _flip(run_dir / f"checkpoints/iter_{step:07d}/.metadata")
    with pytest.raises(RankFailure, match="no checkpoint is as it was written: iter_0000012"):
        ranks.run(2, train_recipe, recipe)
    assert store.latest(run_dir / "checkpoints") == run_dir / "checkpoints/iter_0000012"  # none is renamed


def test_a_checkpoint_from_before_manifests_is_gone_on_from(saved: Path, toy: Path, ranks: RankPool) -> None:
    recipe, run_dir = _recipe(toy, "older"), toy / "older"
    shutil.copytree(saved / "checkpoints/iter_0000008", run_dir / "checkpoints/iter_0000008")
    forget_checksums(run_dir / "checkpoints/iter_0000008")
    said, _ = ranks.run(2, train_and_tell, recipe)
    assert said.count("withoutchecksums") == 1
    assert {step: losses_of(saved)[step] for step in range(8, STEPS)} == losses_of(run_dir)


def writer_killed(rank: int, world_size: int, recipe: Path) -> None:
    """The second rank's writer of the second save is killed as the kernel does where memory runs out."""
    write = saving.write_bucket

    def die(transforms: Any, number: int, bucket: Any) -> Any:
        if rank == 1 and "iter_0000008" in bucket[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(transforms, number, bucket)

    saving.write_bucket = die
    train_recipe(rank, world_size, recipe)


def test_a_writer_that_is_killed_is_named_at_once(saved: Path, toy: Path, ranks: RankPool) -> None:
    recipe, run_dir = _recipe(toy, "writer", checkpoint__async_save=True), toy / "writer"
    with pytest.raises(
        RankFailure, match=r"iter_0000008: could not be written \(rank 1: its writer was ended by signal 9"
    ):
        ranks.run(2, writer_killed, recipe, timeout=60)
    assert store.latest(run_dir / "checkpoints") == run_dir / "checkpoints/iter_0000004"
    ranks.run(2, train_recipe, recipe)
    assert losses_of(run_dir) == losses_of(saved)
    assert not list((run_dir / "checkpoints").glob("*.part"))  # swept


def test_an_export_that_a_kill_left_out_is_made_up_for(saved: Path, toy: Path, ranks: RankPool) -> None:
    recipe, run_dir = _recipe(toy, "export", checkpoint__export_every_steps=8), toy / "export"
    shutil.copytree(saved / "checkpoints/iter_0000008", run_dir / "checkpoints/iter_0000008")
    ranks.run(2, train_recipe, recipe)
    assert (run_dir / "hf/iter_0000008/config.json").is_file()


def test_minutes_save_as_well_as_steps(toy: Path, ranks: RankPool) -> None:
    """A fraction of a minute that is shorter than a step: each step is saved, and none by steps."""
    recipe = _recipe(
        toy,
        "minutes",
        checkpoint__save_every_steps=None,
        checkpoint__save_every_minutes=1e-6,
        train__max_steps=3,
    )
    ranks.run(2, train_recipe, recipe)
    assert [path.name for path in store.complete(toy / "minutes/checkpoints")] == [
        f"iter_{step:07d}" for step in (1, 2, 3)
    ]


def that_sees_other_files(rank: int, world_size: int, root: Path, how: str) -> tuple[str, list[str]]:
    """What the second rank's file system shows differs: a file it cannot read, bytes, a listing that is behind."""
    complete, mesh = store.complete, _mesh(rank, world_size)
    fault = "cannot be read (Input/output error)" if how == "unreadable" else "other content"
    with pytest.MonkeyPatch.context() as patch:  # the rank lives on
        patch.setattr(resuming, "PAUSE_SECONDS", 0.0)
        if rank == 1 and how == "listing":
            patch.setattr(store, "complete", lambda *args, **options: complete(*args, **options)[:-1])
        elif rank == 1:
            patch.setattr(
                resuming, "file_fault", lambda path, digest: fault if path.suffix == ".distcp" else None
            )
        try:
            said = resuming.newest_whole(root, mesh, at_most=None, set_aside=True).newest
        except CheckpointError as error:
            return str(error), sorted(path.name for path in root.iterdir())
    assert said
    return said.name, sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("how", ["listing", "unreadable", "other bytes"])
def test_all_ranks_go_on_from_one_checkpoint_whatever_one_of_them_sees(
    how: str, saved: Path, tmp_path: Path, ranks: RankPool
) -> None:
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    first, second = ranks.run(2, that_sees_other_files, tmp_path / "checkpoints", how)
    assert first == second
    assert not [name for name in first[1] if "broken" in name]
    if how == "listing":
        assert first[0] == "iter_0000012"
    else:
        assert "rank 1 finds: " in first[0]
        assert "rank 0 does not" in first[0]


def test_the_plan_of_packs_is_not_read_from_a_broken_file(saved: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(saved / "checkpoints", run_dir / "checkpoints")
    assert packing_of_run(run_dir) == MIXED
    path = run_dir / "checkpoints/iter_0000012/progress.json"
    path.write_text(path.read_text().replace("/packing 2", "/pacjing 2"))
    assert packing_of_run(run_dir) == MIXED
