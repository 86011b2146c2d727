"""What a run notices of itself, on real ranks: a slow one, long work that is healthy, files that go away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from paralign.engine.checkpoint import store
from paralign.engine.files.lock import locked
from paralign.engine.observe.metrics import read_metrics

from .pool import RankFailure, RankPool
from .toy import make_toy, train_recipe, write_recipe

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
QUIET: dict[str, Any] = {"train__eval_every_steps": None, "checkpoint__save_every_steps": None}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    make_toy(directory)
    return directory


def with_rank_1_asleep(rank: int, world_size: int, recipe: Path) -> None:
    """In the forward pass of each layer, as a device does whose clock is down."""
    from paralign.models.attention import PackedAttention as Attention

    forward = Attention.forward

    def late(self: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.006 * (rank == 1))
        return forward(self, *arguments, **options)

    Attention.forward = late  # type: ignore[method-assign]
    train_recipe(rank, world_size, recipe)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("tp2", TP2),
        pytest.param("dp2", {}, marks=pytest.mark.slow),
        pytest.param("tp2-sequence", TP2 | {"sequence_parallel": True}, marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_is_named(name: str, layout: dict[str, Any], toy: Path, ranks: RankPool) -> None:
    recipe = write_recipe(toy, name, layout, **QUIET, train__max_steps=5)
    ranks.run(2, with_rank_1_asleep, recipe)
    lines = read_metrics(toy / name)
    named = [
        (line["step"], line["slow_rank"], line["slow_rank_ratio"]) for line in lines if "slow_rank" in line
    ]
    assert [(step, rank) for step, rank, _ in named] == [(step, 1.0) for step in (2, 3, 4)]
    assert all(ratio > 1.5 for *_, ratio in named)
    [note] = [line["note"] for line in lines if "note" in line]
    assert note.startswith("rank 1 on ")
    assert "is slow: its own work in a layer takes" in note


def with_slow_evaluations_and_exports(rank: int, world_size: int, recipe: Path) -> None:
    from paralign.engine.checkpoint.hf import StageWriter
    from paralign.engine.training import saving
    from paralign.engine.training.learner import Learner
    from paralign.engine.training.model import Model

    measure, add = Learner.measure, StageWriter.add

    def slowly(self: Any, *arguments: Any) -> Any:
        time.sleep(1)
        return measure(self, *arguments)

    def add_slowly(self: Any, *arguments: Any) -> Any:
        time.sleep(0.2)
        return add(self, *arguments)

    write_bucket = saving.write_bucket

    def write_slowly(transforms: Any, number: int, bucket: Any) -> Any:
        for n_bytes in range(8):
            Path(bucket[0]).write_bytes(bytes(n_bytes))
            time.sleep(0.7)
        return write_bucket(transforms, number, bucket)

    with pytest.MonkeyPatch.context() as patch:  # the rank lives on
        patch.setattr(Learner, "measure", slowly)
        patch.setattr(StageWriter, "add", add_slowly)
        patch.setattr(saving, "write_bucket", write_slowly)
        patch.setattr(Model.tensors, "__defaults__", (1,))  # one tensor a bucket
        train_recipe(rank, world_size, recipe)


@pytest.mark.slow
def test_healthy_work_that_takes_longer_than_the_stall_timeout(toy: Path, ranks: RankPool) -> None:
    """Over 5 s of evaluation, 5 s of saving, 7 s of export, while the second copy waits; a stall would be 3 s."""
    recipe = write_recipe(
        *(toy, "long", {}),
        train__max_steps=1,
        train__eval_every_steps=1,
        train__stall_timeout_minutes=0.05,
        checkpoint__save_every_steps=1,
        optimizer__lr_warmup_steps=0,
    )
    ranks.run(2, with_slow_evaluations_and_exports, recipe)
    assert (toy / "long/hf/final/model.safetensors").exists()


def test_an_evaluation_moves_with_each_pack() -> None:
    from paralign.engine.batch import StepBatch
    from paralign.engine.run.trainer import Trainer

    batch = StepBatch(["a", "b"], {}, 2, 2, (0, 1))  # type: ignore[list-item]
    parts = {
        name: MagicMock()
        for name in ("learner", "train", "checkpoints", "export", "course", "watch", "judge")
    }
    parts["watch"].marking.side_effect = lambda packs: [f"marked {pack}" for pack in packs]
    parts["learner"].no_sums.return_value = 0
    parts["learner"].objective.report.return_value = {}
    seen: list[str] = []
    parts["learner"].measure.side_effect = lambda batch: seen.extend(batch.micro_batches) or MagicMock()
    steps = MagicMock()
    steps.evaluation.return_value = iter([batch, batch])
    Trainer(**parts, validation={"set": steps}).evaluate(0)
    assert seen == ["marked a", "marked b"] * 2


def losing_its_source(rank: int, world_size: int, recipe: Path, source: Path) -> None:
    from paralign.engine.run.trainer import Trainer

    step_of = Trainer.train_step

    def gone_at_2(self: Any, step: int, batch: Any) -> Any:
        if step == 2 and rank == 0:
            shutil.rmtree(source)
        return step_of(self, step, batch)

    with pytest.MonkeyPatch.context() as patch:  # the rank lives on
        patch.setattr(Trainer, "train_step", gone_at_2)
        train_recipe(rank, world_size, recipe)


@pytest.mark.slow
def test_a_source_deleted_in_mid_run_is_needed_no_more(toy: Path, ranks: RankPool) -> None:
    source = toy / "leaving"
    shutil.copytree(toy / "model", source)
    recipe = write_recipe(
        *(toy, "left", {}),
        model__hf=str(source),
        train__max_steps=4,
        train__eval_every_steps=None,
        checkpoint__save_every_steps=3,
    )
    ranks.run(1, losing_its_source, recipe, source)
    assert not source.exists()
    kept = {
        path.name: path.read_bytes() for path in (toy / "model").glob("*.json") if path.name != "config.json"
    }
    for directory in (toy / "left/hf/final", toy / "left/checkpoints/iter_0000003/hf"):
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (directory / name).exists()
        assert (directory / "tokenizer.json").read_bytes() == kept["tokenizer.json"]


def train_without_patience(rank: int, world_size: int, recipe: Path) -> None:
    locked.__wrapped__.__kwdefaults__["patience"] = 0.0  # type: ignore[attr-defined]
    train_recipe(rank, world_size, recipe)


def test_a_second_run_in_one_run_dir_is_told_and_changes_nothing(toy: Path, ranks: RankPool) -> None:
    recipe = write_recipe(toy, "taken", {}, **QUIET, train__max_steps=3)
    with locked(toy / "taken"):
        (toy / "taken/metrics.jsonl").write_text('{"step": 0}\n')
        before = sorted((toy / "taken").iterdir())
        with pytest.raises(RankFailure, match=f"TrainingError: .* in use by process {os.getpid()} on "):
            ranks.run(1, train_without_patience, recipe)
        assert sorted((toy / "taken").iterdir()) == before
    assert (toy / "taken/metrics.jsonl").read_text() == '{"step": 0}\n'


@pytest.mark.slow
def test_the_command_of_a_second_run_ends_with_one_error(toy: Path) -> None:
    recipe = write_recipe(toy, "taken-too", {}, **QUIET, train__max_steps=3)
    command = [sys.executable, "-m", "paralign.engine.cli", "train", str(recipe), "--nproc", "2"]
    with locked(toy / "taken-too"):
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2, second.stderr
    assert second.stderr.count("error:") == 1
    assert f"in use by process {os.getpid()} on " in second.stderr
    assert "Traceback" not in second.stderr


def on_a_disk_that_fills_up(rank: int, world_size: int, recipe: Path, at: str) -> None:
    """The file system is full from step 3 on for what is written at `at`."""
    from paralign.engine.checkpoint import rawfile
    from paralign.engine.files import json_lines
    from paralign.engine.observe import memory
    from paralign.engine.run.trainer import Trainer

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    step_of = Trainer.train_step

    def fill(self: Any, step: int, batch: Any) -> Any:
        if step == 3:
            if at == "metrics":
                json_lines.StepLines.write = full  # type: ignore[method-assign]
            elif at == "memory":
                memory.write_whole = full  # type: ignore[assignment]
                memory.WORTH_WRITING = 0.0  # type: ignore[assignment]
            else:
                rawfile.os.pwrite = full  # type: ignore[assignment]
        return step_of(self, step, batch)

    Trainer.train_step = fill  # type: ignore[method-assign]
    train_recipe(rank, world_size, recipe)


@pytest.mark.parametrize(
    ("at", "place"),
    [("metrics", "metrics.jsonl"), ("memory", "memory.json"), ("export", "hf/iter_0000004.part")],
)
@pytest.mark.slow
def test_a_full_disk_is_one_error_and_checkpoints_stay(
    at: str, place: str, toy: Path, ranks: RankPool
) -> None:
    name = f"full-{at}"
    recipe = write_recipe(
        *(toy, name, {}),
        train__max_steps=6,
        train__eval_every_steps=None,
        checkpoint__save_every_steps=2,
        checkpoint__export_every_steps=4,
    )
    with pytest.raises(
        RankFailure, match=rf"TrainingError: .*{place}.*: No space left on device; make room there"
    ):
        ranks.run(1, on_a_disk_that_fills_up, recipe, at)
    newest = store.latest(toy / name / "checkpoints")
    assert newest is not None
    assert newest.name == ("iter_0000004" if at == "export" else "iter_0000002")
    ranks.run(1, train_recipe, recipe)
    assert [line["step"] for line in read_metrics(toy / name)] == list(range(6))
