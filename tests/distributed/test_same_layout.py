"""`checkpoint.layout: same`: it goes on at its own layout to the bit, and another layout is told what to do."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paralign.engine.checkpoint import store
from paralign.engine.checkpoint.convert import convert
from paralign.engine.checkpoint.file_manifest import broken_files
from paralign.engine.checkpoint.unpickle import read_metadata
from paralign.engine.processes.stop import Stop
from paralign.engine.run.check import check
from paralign.engine.run.rank import train
from paralign.engine.run.recipe import load

from .comparing import assert_weights_equal, metrics_of
from .pool import RankFailure, RankPool
from .toy import make_toy, train_recipe, write_recipe

TP2 = {
    "tensor_model_parallel_size": 2,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "ddp_bucket_size": 20000,
}
SAME: dict[str, Any] = {"model__dtype": "bf16", "checkpoint__layout": "same"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """Ten steps at TP2×DP2 in bf16, the state after five saved for that layout."""
    directory = tmp_path_factory.mktemp("toy")
    make_toy(directory)
    ranks.run(4, train_recipe, write_recipe(directory, "straight", TP2, **SAME, checkpoint__async_save=True))
    return directory


def _resumed(directory: Path, name: str, layout: dict[str, Any], **changes: Any) -> Path:
    """A recipe of another run that has the state after five steps."""
    root = directory / name / "checkpoints"
    shutil.copytree(directory / "straight/checkpoints/iter_0000005", root / "iter_0000005")
    return write_recipe(directory, name, layout, **{**SAME, "checkpoint__save_every_steps": None, **changes})


def test_the_last_state_goes_on_anywhere_and_those_before_only_there(trained: Path) -> None:
    states = store.complete(trained / "straight/checkpoints")
    assert [bool(store.read_progress(state).buckets) for state in states] == [True, False]
    kept_buckets = [
        any("bucket_idx" in name for name in read_metadata(state).state_dict_metadata) for state in states
    ]
    assert kept_buckets == [True, False]
    assert [broken_files(state) for state in states] == [[], []]


def test_same_layout_is_equal_to_the_bit(trained: Path, ranks: RankPool) -> None:
    ranks.run(4, train_recipe, _resumed(trained, "again", TP2))
    theirs = {key: value for key, value in metrics_of(trained / "straight").items() if key[0] >= 5}
    assert metrics_of(trained / "again") == theirs
    assert_weights_equal(trained / "again/hf/final", trained / "straight/hf/final")


@pytest.mark.parametrize("n_ranks", [2, 8])
def test_another_number_of_copies_goes_on(trained: Path, n_ranks: int, ranks: RankPool) -> None:
    name = f"on {n_ranks} ranks"
    ranks.run(n_ranks, train_recipe, _resumed(trained, name, TP2))
    straight, resumed = metrics_of(trained / "straight"), metrics_of(trained / name)
    for key, value in resumed.items():
        assert value == pytest.approx(straight[key], rel=2e-2), (
            key
        )  # gradients of bf16 add up in another order


def test_convert_takes_the_weights(trained: Path, tmp_path: Path) -> None:
    convert(trained / "straight/checkpoints/iter_0000005", tmp_path / "hf", progress=False)
    convert(trained / "straight/checkpoints/iter_0000010", tmp_path / "last", progress=False)
    assert_weights_equal(tmp_path / "last", trained / "straight/hf/final")


@pytest.mark.parametrize(
    ("layout", "n_ranks", "named"),
    [
        ({}, 2, "tensor_model_parallel_size 2 there and 1 here"),
        ({**TP2, "ddp_bucket_size": None}, 4, "ddp_bucket_size 20000 there and 40000000 here"),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            4,
            "pipeline_model_parallel_size 1 there and 2 here",
        ),
    ],
    ids=["TP1", "buckets", "PP2"],
)
def test_another_layout_is_refused(
    trained: Path, layout: dict[str, Any], n_ranks: int, named: str, ranks: RankPool
) -> None:
    name = "refused-" + "-".join(layout)
    with pytest.raises(RankFailure, match=f"goes on at that layout only: .*{named}.*--resave --nproc 4"):
        ranks.run(n_ranks, train_recipe, _resumed(trained, name, layout))


def test_another_precision_is_refused(trained: Path, ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="dtype bfloat16 there and float32 here"):
        ranks.run(4, train_recipe, _resumed(trained, "fp32", TP2, model__dtype="fp32"))


def resave(rank: int, world_size: int, recipe: Path, overrides: list[str]) -> None:
    train(check(load(recipe, overrides), world_size), Stop(), local_rank=rank, resave=True)


def test_the_command_that_an_error_names_makes_it_go_on_anywhere(trained: Path, ranks: RankPool) -> None:
    recipe = _resumed(trained, "moved", {}, checkpoint__keep_last=1)
    with pytest.raises(RankFailure) as refused:
        ranks.run(1, train_recipe, recipe)
    words = _command_of(str(refused.value))
    assert words[:2] == ["paralign", "train"]
    assert words[5:] == ["--resave", "--nproc", "4"]
    before = store.read_progress(trained / "moved/checkpoints/iter_0000005")
    ranks.run(4, resave, Path(words[2]), words[3:5])  # the recipe there names the run that it is a copy from
    after = store.read_progress(trained / "moved/checkpoints/iter_0000005")
    assert before.buckets
    assert not after.buckets
    assert (before.step, before.data, before.metrics) == (after.step, after.data, after.metrics)

    ranks.run(1, train_recipe, recipe)
    straight = metrics_of(trained / "straight")
    for key, value in metrics_of(trained / "moved").items():
        assert value == pytest.approx(straight[key], rel=2e-2), key


def asked_to_stop(rank: int, world_size: int, recipe: Path) -> None:
    stop = Stop()
    stop.signal = signal.SIGTERM
    train(check(load(recipe), world_size), stop, local_rank=rank)


def test_what_a_signal_saves_goes_on_anywhere(trained: Path, ranks: RankPool) -> None:
    recipe = _resumed(trained, "stopped", TP2)
    state = trained / "stopped/checkpoints/iter_0000005"
    assert store.read_progress(state).buckets
    ranks.run(4, asked_to_stop, recipe)
    assert not store.read_progress(state).buckets


@pytest.mark.slow
def test_the_same_command_as_a_user_gives_it(trained: Path, ranks: RankPool) -> None:
    shutil.copytree(trained / "straight", trained / "kept")
    shutil.rmtree(trained / "straight/checkpoints/iter_0000010")
    recipe = write_recipe(trained, "straight", {}, **SAME)
    with pytest.raises(RankFailure) as refused:
        ranks.run(1, train_recipe, recipe)
    words = _command_of(str(refused.value))
    command = [sys.executable, "-m", "paralign.engine.cli", *words[1:]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "iter_0000005: written again; any layout loads it" in ended.stdout
    ranks.run(1, train_recipe, recipe)
    shutil.rmtree(trained / "straight")
    (trained / "kept").rename(trained / "straight")


def _command_of(error: str) -> list[str]:
    command = re.search(r"`(paralign train [^`]*)`", error)
    assert command
    return shlex.split(command[1])
