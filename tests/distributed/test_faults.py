"""Faults in the middle of a run at TP2 × PP2: each ends within its bound, and the next start equals no fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from paralign.engine.checkpoint import store
from paralign.engine.observe.health import EXIT_STALLED
from paralign.engine.observe.metrics import read_metrics
from paralign.engine.processes.stop import EXIT_STOPPED

from .pool import RankFailure, RankPool
from .processes import Processes
from .toy import losses_of, make_toy, train_recipe, write_recipe

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
TP2_PP2 = TP2 | {"pipeline_model_parallel_size": 2}
STEPS = 30


def _recipe(toy: Path, name: str, n: int = 4, **changes: Any) -> Path:
    settings = {
        "train__max_steps": STEPS,
        "train__eval_every_steps": None,
        "checkpoint__save_every_steps": None,
    }
    return write_recipe(toy, name, TP2 if n == 2 else TP2_PP2, **(settings | changes))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    make_toy(directory)
    return directory


@pytest.fixture(scope="module")
def undisturbed_on(toy: Path, ranks: RankPool) -> Callable[[int], dict[int, float]]:
    """Losses by number of ranks; each run is made once."""

    @cache
    def losses(n: int) -> dict[int, float]:
        ranks.run(n, train_recipe, _recipe(toy, f"undisturbed-{n}", n))
        return losses_of(toy / f"undisturbed-{n}")

    return losses


@pytest.fixture(scope="module")
def undisturbed(undisturbed_on: Callable[[int], dict[int, float]]) -> dict[int, float]:
    return undisturbed_on(4)


def _started(processes: Processes, recipe: Path, run_dir: Path, n_steps: int) -> subprocess.Popen[bytes]:
    """`paralign train`, which has come as far as so many steps."""
    launcher = processes.start([sys.executable, "-m", "paralign.engine.cli", "train", str(recipe)])
    processes.wait_until(lambda: len(losses_of(run_dir)) >= n_steps, 240)
    return launcher


@pytest.mark.parametrize(
    ("number", "n"),
    [
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGTERM, 4, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 4, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_saves_and_stops_all(
    number: signal.Signals,
    n: int,
    toy: Path,
    undisturbed_on: Callable[[int], dict[int, float]],
    processes: Processes,
    ranks: RankPool,
) -> None:
    recipe = _recipe(toy, f"signal-{number.name}-{n}", n)
    run_dir = toy / f"signal-{number.name}-{n}"
    launcher = _started(processes, recipe, run_dir, 2)
    os.kill(processes.ranks()[n - 1], number)
    assert launcher.wait(60) == EXIT_STOPPED, processes.log.read_text()
    saved = store.latest(run_dir / "checkpoints")
    assert saved is not None
    assert store.read_progress(saved).step == max(losses_of(run_dir)) + 1  # nothing done is lost
    assert not (run_dir / "hf/final").exists()

    ranks.run(n, train_recipe, recipe)
    assert losses_of(run_dir) == undisturbed_on(n)


@pytest.mark.slow
def test_a_stopped_rank_is_named(
    toy: Path,
    undisturbed: dict[int, float],
    processes: Processes,
    ranks: RankPool,
) -> None:
    recipe = _recipe(toy, "stalled", train__stall_timeout_minutes=0.25, checkpoint__save_every_steps=20)
    launcher = _started(processes, recipe, toy / "stalled", 21)
    began = time.monotonic()
    os.kill(processes.ranks()[2], signal.SIGSTOP)
    assert launcher.wait(120) == EXIT_STALLED
    assert time.monotonic() - began < 60  # 15 s of silence, 5 s for the others to say where they are
    error = processes.log.read_text()
    assert error.count("error:") == 1
    assert "rank 2 stalled and does not answer" in error
    written = sorted((toy / "stalled/stall").glob("rank_*"))
    assert [path.name for path in written] == [f"rank_{rank:05d}.txt" for rank in (0, 1, 3)]
    assert "Thread" in written[0].read_text()

    ranks.run(4, train_recipe, recipe)
    assert losses_of(toy / "stalled") == undisturbed


def killed_in_a_save(rank: int, world_size: int, recipe: Path) -> None:
    from paralign.engine.training import state as native

    publish = native.store.publish

    def die(directory: Path) -> None:
        if directory.name == "iter_0000020":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(directory)

    native.store.publish = die  # type: ignore[assignment]
    train_recipe(rank, world_size, recipe)


@pytest.mark.slow
def test_killed_in_a_save(
    toy: Path, undisturbed: dict[int, float], ranks: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(toy, "killed", checkpoint__save_every_steps=10)
    with pytest.raises(RankFailure, match="died with exit code -9"):
        ranks.run(4, killed_in_a_save, recipe)
    root = toy / "killed/checkpoints"
    assert store.passed_over(root) == ["iter_0000020.part"]
    assert store.latest(root) == root / "iter_0000010"
    capfd.readouterr()
    ranks.run(4, train_recipe, recipe)
    assert "iter_0000020.part" in capfd.readouterr().out.replace("\n", "").replace("│", "").replace(" ", "")
    assert losses_of(toy / "killed") == undisturbed


def nan_at_step_6(rank: int, world_size: int, recipe: Path) -> None:
    from paralign.engine.training import learner as module

    run_step, steps = module.run_step, iter(range(1000))

    def poisoned(model: Any, batch: Any, objective: Any, **options: Any) -> Any:
        sums = run_step(model, batch, objective, **options)
        if next(steps) == 6 and model.mesh.is_last_stage and model.mesh.tp.rank == 1:
            divided = (p for p in model.chunks[0].parameters() if getattr(p, "tensor_model_parallel", False))
            next(divided).main_grad.view(-1)[0] = float("nan")
        return sums

    module.run_step = poisoned  # type: ignore[assignment]
    train_recipe(rank, world_size, recipe)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nan_stops_the_run_and_is_located(
    n: int, toy: Path, undisturbed_on: Callable[[int], dict[int, float]], ranks: RankPool
) -> None:
    name = f"nan-stop-{n}"
    recipe = _recipe(toy, name, n)
    with pytest.raises(RankFailure, match=r"step 6: the gradient norm is nan; .*chats\.jsonl:\d+"):
        ranks.run(n, nan_at_step_6, recipe)
    root = toy / name / "checkpoints"
    assert store.latest(root) == root / "iter_0000006"  # the weights before that step
    ranks.run(n, train_recipe, recipe)
    assert losses_of(toy / name) == undisturbed_on(n)


@pytest.mark.slow
def test_nan_is_skipped_where_the_recipe_says_so(
    toy: Path, undisturbed: dict[int, float], ranks: RankPool
) -> None:
    ranks.run(4, nan_at_step_6, _recipe(toy, "nan-skip", train__on_nonfinite="skip"))
    lines = read_metrics(toy / "nan-skip")
    assert [line["step"] for line in lines if line.get("skipped")] == [6]
    assert any("chats.jsonl:" in line.get("note", "") for line in lines)
    losses = losses_of(toy / "nan-skip")
    assert all(losses[step] == undisturbed[step] for step in range(7))
    assert losses[7] != undisturbed[7]
    assert losses[STEPS - 1] < undisturbed[0]


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(
    toy: Path, undisturbed: dict[int, float], ranks: RankPool
) -> None:
    disk = toy / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system needs the right to mount one")
    try:
        recipe = _recipe(toy, "disk/run", checkpoint__save_every_steps=10)
        with pytest.raises(RankFailure, match=r"could not be written .* is complete and stays"):
            ranks.run(4, train_recipe, recipe)
        newest = store.latest(disk / "run/checkpoints")
        assert newest is not None
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        ranks.run(4, train_recipe, recipe)
        assert losses_of(disk / "run") == undisturbed
    finally:
        subprocess.run(["umount", str(disk)], check=True)
