"""Preference runs from files to exports: cached and online references, resume, rewards that transformers repeats."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from paralign.engine.observe.metrics import read_metrics
from paralign.engine.parallel.layout import LayoutConfig
from paralign.engine.processes.launch import RankEnv
from paralign.engine.run.score_file import score_file

from .pool import RankFailure, RankPool
from .toy import make_preferences, make_toy, train_recipe, write_recipe

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
DPO = {"name": "dpo", "beta": 0.1}
KTO = {"name": "kto", "beta": 0.1}
SAVING: dict[str, Any] = {"checkpoint__save_every_steps": 3}
REWARD = {"name": "reward", "alpha": 0.1, "score_range": [1, 5]}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("preferences")
    make_toy(directory, n_chats=20)
    make_preferences(directory)
    return directory


def _recipe(toy: Path, name: str, layout: dict[str, Any], objective: dict[str, Any], **changes: Any) -> Path:
    data = str(toy / ("labelled.jsonl" if objective["name"] == "kto" else "pairs.jsonl"))
    settings: dict[str, Any] = {
        "data__train": data,
        "data__validation": {"same": data},
        "train__max_steps": 6,
        "train__global_batch_size": 4,
        "checkpoint__save_every_steps": None,  # a save costs seconds
    }
    return write_recipe(toy, name, layout, objective=objective, **(settings | changes))


def _losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir) if "loss" in line]


def test_dpo_cached_equals_online_at_another_layout(toy: Path, ranks: RankPool) -> None:
    ranks.run(4, train_recipe, _recipe(toy, "cached", TP2_PP2, DPO))
    ranks.run(2, train_recipe, _recipe(toy, "online", {}, DPO | {"reference": "online"}))
    cached, online = _losses(toy / "cached"), _losses(toy / "online")
    assert cached[0] == pytest.approx(math.log(2), abs=1e-6)
    assert cached == pytest.approx(online, rel=1e-5)
    measured = [line for line in read_metrics(toy / "cached") if "validation/same/loss" in line]
    before, after = measured[0], measured[-1]
    assert before["validation/same/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert after["validation/same/rewards/accuracies"] > 0.8
    assert after["validation/same/rewards/margins"] > 0
    assert after["validation/same/logps/chosen"] < 0


def test_the_stored_reference_serves_every_layout_and_nobody_else(toy: Path, ranks: RankPool) -> None:
    ranks.run(2, train_recipe, _recipe(toy, "first", {}, DPO))
    (stored,) = toy.glob("cache/*/reference-*.npz")
    written = stored.stat().st_mtime_ns
    ranks.run(1, train_recipe, _recipe(toy, "second", {}, DPO))
    assert stored.stat().st_mtime_ns == written
    assert _losses(toy / "first") == pytest.approx(_losses(toy / "second"), rel=1e-5)

    whole = stored.read_bytes()
    import numpy as np

    with np.load(stored) as content:
        made_by = json.loads(str(content["made_by"])) | {"weights": "of another model"}
        np.savez(stored, values=content["values"], made_by=np.array(json.dumps(made_by)))
    try:
        with pytest.raises(RankFailure, match=r"reference-\w+\.npz: reference .* made by other weights than"):
            ranks.run(1, train_recipe, _recipe(toy, "third", {}, DPO))
    finally:
        stored.write_bytes(whole)

    stored.write_bytes(whole[: len(whole) // 2])
    ranks.run(2, train_recipe, _recipe(toy, "after damage", {}, DPO))
    with np.load(stored) as again, np.load(io.BytesIO(whole)) as before:
        assert again["values"] == pytest.approx(before["values"], rel=1e-5)  # of another layout, perhaps
    assert _losses(toy / "after damage") == pytest.approx(_losses(toy / "first"), rel=1e-5)


def test_kto_is_the_same_however_it_is_divided(toy: Path, ranks: RankPool) -> None:
    ranks.run(1, train_recipe, _recipe(toy, "kto-1", {}, KTO))
    ranks.run(
        4,
        train_recipe,
        _recipe(toy, "kto-4", {"pipeline_model_parallel_size": 2}, KTO | {"reference": "online"}),
    )
    one, four = _losses(toy / "kto-1"), _losses(toy / "kto-4")
    assert one == pytest.approx(four, rel=1e-5)
    assert one[0] == pytest.approx(0.5, abs=1e-6)  # before the first step every log-ratio is 0


def test_kto_is_the_same_with_prompts_shared_or_not(toy: Path, ranks: RankPool) -> None:
    """Where steps hold the same answers, as here all of them: their baseline is of the same mismatched answers."""
    found = []
    for share in (True, False):
        name, objective = f"kto-shared-{share}", KTO | {"share_prefix": share}
        whole = {"train__global_batch_size": 64, "train__max_steps": 3, "train__eval_every_steps": None}
        ranks.run(1, train_recipe, _recipe(toy, name, {}, objective, **whole))
        found.append([line for line in read_metrics(toy / name) if "loss" in line])
    shared, unshared = found
    assert shared[2]["kl"] > 0.05
    for metric in ("loss", "kl", "grad_norm"):
        assert [line[metric] for line in shared] == pytest.approx(
            [line[metric] for line in unshared], rel=1e-4, abs=1e-7
        )


def test_a_step_of_one_prompt_has_no_baseline_and_says_so_once(toy: Path, ranks: RankPool) -> None:
    records = [{"prompt": "red sun", "completion": f"{w} star", "label": w != "one"} for w in ("one", "two")]
    (toy / "one-prompt.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"data__train": str(toy / "one-prompt.jsonl"), "data__validation": {}}
    for reference in ("cached", "online"):
        name, objective = f"one-prompt-{reference}", KTO | {"reference": reference}
        recipe = _recipe(toy, name, {}, objective, **data, train__eval_every_steps=None, train__max_steps=3)
        ranks.run(1, train_recipe, recipe)
        lines = read_metrics(toy / name)
        assert [line["kl"] for line in lines if "kl" in line] == [0, 0, 0]
        (note,) = (line["note"] for line in lines if "note" in line)
        assert "step 0: all its answers are to one prompt" in note


def test_resumed_reward_model_equals_uninterrupted(toy: Path, ranks: RankPool) -> None:
    ranks.run(4, train_recipe, _recipe(toy, "reward", TP2_PP2, REWARD))
    with pytest.raises(RankFailure):
        ranks.run(4, train_recipe, _recipe(toy, "reward-killed", TP2_PP2, REWARD, **SAVING), 4)
    ranks.run(2, train_recipe, _recipe(toy, "reward-killed", {"pipeline_model_parallel_size": 2}, REWARD))
    assert _losses(toy / "reward-killed") == pytest.approx(_losses(toy / "reward"), rel=1e-4)

    from safetensors.torch import load_file

    whole, resumed = (
        {k: v for f in (toy / name / "hf/final").glob("*.safetensors") for k, v in load_file(f).items()}
        for name in ("reward", "reward-killed")
    )
    assert whole.keys() == resumed.keys()
    assert torch.allclose(whole["score.weight"], resumed["score.weight"], atol=1e-6)


@pytest.mark.parametrize("objective", [DPO, KTO], ids=["dpo", "kto"])
def test_resumed_at_another_layout_goes_on_alike(
    objective: dict[str, Any], toy: Path, ranks: RankPool
) -> None:
    """The reference, and KTO's mismatched answers, are those of the same steps."""
    straight, resumed = toy / f"{objective['name']}-straight", toy / f"{objective['name']}-resumed"
    ranks.run(
        2, train_recipe, _recipe(toy, straight.name, {"tensor_model_parallel_size": 2}, objective, **SAVING)
    )
    shutil.copytree(straight / "checkpoints/iter_0000003", resumed / "checkpoints/iter_0000003")
    ranks.run(1, train_recipe, _recipe(toy, resumed.name, {}, objective))
    lines = [line for line in read_metrics(resumed) if "loss" in line]
    assert [line["step"] for line in lines] == [3, 4, 5]
    assert [line["loss"] for line in lines] == pytest.approx(_losses(straight)[3:], rel=1e-5)


def test_transformers_opens_the_reward_model_with_equal_scores(
    toy: Path, ranks: RankPool, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ranks.run(2, train_recipe, _recipe(toy, "exported", {"tensor_model_parallel_size": 2}, REWARD))
    exported = toy / "exported/hf/final"
    output = tmp_path / "rewards.jsonl"
    ranks.run(2, score_with_pool, exported, toy / "chats.jsonl", output)
    rewards = [json.loads(line) for line in output.read_text().splitlines()]

    chats = [json.loads(line)["messages"] for line in (toy / "chats.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForSequenceClassification.from_pretrained(exported).eval()
    assert type(model).__name__ == "LlamaForSequenceClassification"
    inputs = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    assert (inputs["attention_mask"].sum(1).unique().numel()) > 1  # a batch that is padded
    with torch.no_grad():
        batched = model(**inputs).logits[:, 0].tolist()
    assert [row["line"] for row in rewards] == list(range(1, len(chats) + 1))
    assert [row["reward"] for row in rewards] == pytest.approx(batched, abs=1e-5)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def score_with_pool(rank: int, world_size: int, model: Path, data: Path, output: Path) -> None:
    """Scoring as one rank of the pool, whose world is open already."""
    from paralign.engine.parallel import mesh

    opened, mesh.open_world = mesh.open_world, _already_open  # type: ignore[assignment]
    try:
        score_file(
            model,
            data,
            output,
            layout=LayoutConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=2),
            env=RankEnv(rank=rank, local_rank=rank, world_size=world_size, master="127.0.0.1:1"),
            dtype="fp32",
            tokens_per_pack=96,
        )
    finally:
        mesh.open_world = opened


def _already_open(**_: Any) -> Any:
    from contextlib import nullcontext

    return nullcontext()
