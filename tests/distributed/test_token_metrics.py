"""Entropy, accuracy and token counts of a run are those that TRL's trainers log, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paralign.engine.data.cache import TokenCache
from paralign.engine.observe.metrics import read_metrics
from paralign.engine.run.check import check
from paralign.engine.run.recipe import load
from paralign.models.errors import RecipeError

from .pool import RankPool
from .toy import make_preferences, make_toy, train_recipe, write_recipe

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

NAMES = ("entropy", "mean_token_accuracy", "num_tokens")
LAYOUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
}
ALL_AT_ONCE = {  # every sample in each step
    "train__global_batch_size": 64,
    "train__max_steps": 2,
    "train__eval_every_steps": None,
    "checkpoint__save_every_steps": None,
    "optimizer__lr_warmup_steps": 0,
    "observe__token_metrics": list(NAMES),
}


def ours(
    ranks: RankPool, directory: Path, name: str, **keys: Any
) -> tuple[list[dict[str, float]], TokenCache]:
    """The lines of a run on one rank, after one at a layout has logged the same; and its samples."""
    runs = []
    for world_size, layout in ((1, {}), (4, LAYOUT)):
        recipe = write_recipe(directory, f"{name}{world_size}", layout, **ALL_AT_ONCE, **keys)
        ranks.run(world_size, train_recipe, recipe)
        runs.append(read_metrics(directory / f"{name}{world_size}"))
    for line, other in zip(*runs, strict=True):
        for name in (*NAMES, "loss"):
            assert other[name] == pytest.approx(line[name], rel=1e-5)
    cache = check(load(recipe), 4).caches["train"]
    assert len(runs[0]) == 2
    return runs[0], cache


def theirs(kind: str, directory: Path, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What TRL's trainer of a kind logs of two steps, all rows in each."""
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(directory / "theirs"),
        per_device_train_batch_size=len(rows),
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "entropy" in line]


def assert_as_theirs(lines: list[dict[str, float]], logged: list[dict[str, float]]) -> None:
    for name in NAMES:
        assert lines[0][name] == pytest.approx(logged[0][name], rel=1e-6), name
    assert lines[1]["num_tokens"] == logged[1]["num_tokens"] == 2 * lines[0]["num_tokens"]


def test_sft_logs_what_trl_logs(ranks: RankPool, tmp_path: Path) -> None:
    make_toy(tmp_path, n_chats=24)
    lines, cache = ours(ranks, tmp_path, "sft")
    rows = []
    for i in range(len(cache)):
        tokens, weights = cache.group(i).whole()
        rows.append({"input_ids": tokens.tolist(), "labels": np.where(weights > 0, tokens, -100).tolist()})
    assert_as_theirs(lines, theirs("SFT", tmp_path, rows))


def test_dpo_logs_what_trl_logs(ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toy(tmp_path, n_chats=8)
    make_preferences(tmp_path)
    lines, cache = ours(
        *(ranks, tmp_path, "dpo"),
        objective={"name": "dpo", "beta": 0.1},
        data__train=[str(tmp_path / "pairs.jsonl")],
        data__validation={},
    )
    rows = []
    for i in range(len(cache)):
        group = cache.group(i)
        chosen, rejected = (answer.tokens.tolist() for answer in group.answers)
        rows.append({"prompt_ids": group.prompt.tolist(), "chosen_ids": chosen, "rejected_ids": rejected})
    monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", lambda _, dataset, *rest: dataset)
    assert_as_theirs(lines, theirs("DPO", tmp_path, rows))


def test_a_scalar_head_has_no_entropy(tmp_path: Path) -> None:
    make_toy(tmp_path, n_chats=8)
    make_preferences(tmp_path)
    recipe = write_recipe(
        tmp_path, "reward", {}, objective={"name": "reward", "alpha": 0.0}, observe__token_metrics=["entropy"]
    )
    with pytest.raises(RecipeError, match=r"entropy need a language model's head.*leave num_tokens only"):
        load(recipe)
