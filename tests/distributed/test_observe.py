"""What a run leaves to look at: a trace of every rank, the peak memory of every rank, TensorBoard's events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paralign.engine.observe.metrics import read_metrics
from paralign.engine.run.check import check
from paralign.engine.run.recipe import load
from paralign.models.errors import RecipeError

from .pool import RankPool
from .toy import make_toy, train_recipe, write_recipe


def test_a_run_can_be_looked_at(tmp_path: Path, ranks: RankPool) -> None:
    make_toy(tmp_path)
    recipe = write_recipe(
        *(tmp_path, "run", {"tensor_model_parallel_size": 2}),
        observe__profile={"from": 1, "to": 3},
        observe__tensorboard=True,
        train__max_steps=4,
        train__eval_every_steps=None,
        checkpoint__save_every_steps=None,
    )
    ranks.run(2, train_recipe, recipe)
    run_dir = tmp_path / "run"
    for rank in range(2):
        trace = json.loads((run_dir / f"profile/rank_{rank:05d}.json").read_text())
        updates = [event for event in trace["traceEvents"] if "Optimizer.step" in event.get("name", "")]
        assert len(updates) == 2, "two steps are in the window"
    memory = json.loads((run_dir / "memory.json").read_text())
    assert [(row["rank"], row["tp"], row["pp"], row["dp"]) for row in memory] == [(0, 0, 0, 0), (1, 1, 0, 0)]
    assert all(row["peak_gb"] > 0.1 for row in memory)
    logged = [line["peak_memory_gb"] for line in read_metrics(run_dir) if "loss" in line]
    assert logged == sorted(logged)
    assert list((run_dir / "tensorboard").iterdir())

    # The window has to lie in the run.
    beyond = write_recipe(tmp_path, "beyond", {}, observe__profile={"from": 1, "to": 30})
    with pytest.raises(RecipeError, match=r"traces up to step 30, and the run has 10 steps"):
        check(load(beyond))
