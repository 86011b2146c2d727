"""TensorBoard and Weights & Biases for real, the latter offline, over a resumed run."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from paralign.engine.observe import config as config_module
from paralign.engine.observe.config import ObserveConfig, WandbConfig, check_installed
from paralign.engine.observe.metrics import MetricsLog
from paralign.models.errors import RecipeError

RECIPE = "objective: sft\ntrain:\n  seed: 1\n"


def run(run_dir: Path, config: ObserveConfig, first_step: int, *losses: float) -> None:
    log = MetricsLog.for_rank(0, run_dir, first_step=first_step, total_steps=9, config=config, recipe=RECIPE)
    log.start({"model": "tiny"})
    for step, loss in enumerate(losses, start=first_step):
        log.log(step, {"loss": loss, "validation/chat/loss": 2 * loss})
    log.note(first_step, "something happened")
    log.close()


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    config = ObserveConfig(tensorboard=True)
    run(tmp_path, config, 0, 7.0)  # died before its first checkpoint
    run(tmp_path, config, 0, 5.0, 4.0, 3.0)
    run(tmp_path, config, 2, 3.5, 2.5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((0, 5.0), (1, 4.0), (2, 3.5), (3, 2.5))
    ]
    assert [event.value for event in events.Scalars("validation/chat/loss")] == [10.0, 8.0, 7.0, 5.0]
    assert "seed: 1" in str(events.Tensors("recipe/text_summary")[0].tensor_proto.string_val)


def _records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, behind a header of seven bytes."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a header never crosses a block
            at += left
            continue
        length, kind = struct.unpack_from("<4xHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def _offline_runs(run_dir: Path) -> list[tuple[str, str, list[dict[str, str]]]]:
    """Id, project and history rows, as JSON texts, of each session, oldest first."""
    found = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        run_id, project, rows = "", "", []
        for data in _records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                run_id, project = record.run.run_id, record.run.project
            if record.HasField("history"):
                rows.append({(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item})
        found.append((run_id, project, rows))
    return found


@pytest.mark.timeout(120)
def test_wandb_offline_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = ObserveConfig(wandb=WandbConfig(project="align", mode="offline"))
    run(tmp_path / "first", config, 0, 5.0, 4.0)
    time.sleep(1.1)  # sessions have folders named by the second
    run(tmp_path / "first", config, 2, 3.0, float("nan"))
    sessions = _offline_runs(tmp_path / "first")
    assert [project for _, project, _ in sessions] == ["align", "align"]
    kept = (tmp_path / "first/wandb/run_id.txt").read_text()
    assert [run_id for run_id, _, _ in sessions] == [kept, kept]
    curve = [(row["step"], row["loss"]) for _, _, rows in sessions for row in rows if "loss" in row]
    assert [(int(step), loss.strip('"')) for step, loss in curve] == [
        *((0, "5"), (1, "4"), (2, "3"), (3, "NaN"))
    ]


@pytest.mark.timeout(120)
def test_wandb_without_a_login_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(RecipeError, match=r"observe.wandb: No API key .*mode: offline"):
        run(tmp_path, ObserveConfig(wandb=WandbConfig(project="align")), 0, 5.0)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name: None)
    check_installed(ObserveConfig())
    with pytest.raises(RecipeError, match=r"observe.tensorboard: .* pip install 'paralign\[track\]'"):
        check_installed(ObserveConfig(tensorboard=True))
