"""Greedy answers of the engine's own forward pass are those of transformers, at any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paralign.engine.config.model import ModelConfig
from paralign.engine.observe.metrics import read_metrics
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.rollout.generate import greedy
from paralign.engine.training.model import Model
from paralign.models import arch_from_hf

from .pool import RankPool
from .reference import tiny_model
from .toy import make_toy, train_recipe, write_recipe

PROMPTS = [[5, 17, 230, 9], [101], [44, 3, 250, 250, 12, 8, 77]]
MAX_NEW_TOKENS, ROWS = 6, 64


def answer(rank: int, world_size: int, path: Path, keys: dict[str, Any], stops: list[int]) -> list[list[int]]:
    saved = torch.load(path, weights_only=False)
    arch = arch_from_hf(saved["config"])
    layout = resolve(
        LayoutConfig(**keys), arch, world_size=world_size, global_batch_size=4, tokens_per_pack=ROWS
    )
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        section = ModelConfig(hf=Path(), dtype="fp32")
        model = Model.open(arch, mesh, section, saved["weights"].__getitem__)
        answers = greedy(
            model,
            [np.array(tokens, dtype=np.int32) for tokens in PROMPTS],
            tokens_per_pack=ROWS,
            max_new_tokens=MAX_NEW_TOKENS,
            stops=frozenset(stops),
        )
    return answers


def expected_answers(model: Any) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(MAX_NEW_TOKENS):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


@pytest.mark.parametrize(
    ("world_size", "keys"),
    [
        (1, {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}),
        (
            8,
            {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "sequence_parallel": True,
            },
        ),
    ],
    ids=["1", "TP2×PP2×VPP2×DP2"],
)
def test_answers_are_those_of_transformers(
    world_size: int, keys: dict[str, Any], ranks: RankPool, tmp_path: Path
) -> None:
    model = tiny_model("llama", layers=4)
    path = tmp_path / "model.pt"
    torch.save({"config": model.config.to_dict(), "weights": model.state_dict()}, path)
    expected = expected_answers(model)
    found = ranks.run(world_size, answer, path, keys, [])
    assert found == [expected] * world_size

    stop = expected[0][2]  # an answer ends with the token that stops it
    stopped = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in expected]
    assert stopped != expected
    assert ranks.run(world_size, answer, path, keys, [stop])[0] == stopped


def test_curves_of_sources_and_answers_are_the_same_at_any_layout(ranks: RankPool, tmp_path: Path) -> None:
    make_toy(tmp_path, n_chats=40)
    chats = (tmp_path / "chats.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text("".join(chats[:10]))
    runs: list[tuple[list[dict[str, float]], list[dict[str, str]]]] = []
    for world_size, layout in (
        (1, {}),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ):
        recipe = write_recipe(
            tmp_path,
            f"on{world_size}",
            layout,
            data__train=[
                str(tmp_path / "chats.jsonl"),
                {"path": str(tmp_path / "more.jsonl"), "weight": 1.5},
            ],
            optimizer__lr_warmup_steps=0,
            train__max_steps=2,
            train__eval_every_steps=2,
            train__generate_samples=2,
            train__generate_max_tokens=4,
            checkpoint__save_every_steps=None,
        )
        ranks.run(world_size, train_recipe, recipe)
        written = (tmp_path / f"on{world_size}" / "generations.jsonl").read_text().splitlines()
        runs.append((read_metrics(tmp_path / f"on{world_size}"), [json.loads(line) for line in written]))
    (alone, answers), (parallel, parallel_answers) = runs
    steps = [line for line in alone if "loss" in line]
    assert len(steps) == 2
    for line, other in zip(steps, (line for line in parallel if "loss" in line), strict=True):
        curves = [line["loss/chats"], line["loss/more"]]
        assert min(curves) < line["loss"] < max(curves)
        for name in ("loss", "loss/chats", "loss/more"):
            assert other[name] == pytest.approx(line[name], rel=1e-5)
    assert not any(name.startswith("validation/same/loss/") for line in alone for name in line)
    assert [(line["step"], line["set"]) for line in answers] == [(0, "same")] * 2 + [(2, "same")] * 2
    assert all(line["prompt"].endswith("assistant") for line in answers)
    assert parallel_answers == answers
