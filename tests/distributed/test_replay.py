"""`--replay-step`: a step comes out as it was logged, and the sample that spoilt one is found."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from paralign.engine.data.epochs import Epochs, packs_of_step
from paralign.engine.observe.metrics import read_metrics
from paralign.engine.processes.stop import Stop
from paralign.engine.run.check import check
from paralign.engine.run.rank import train
from paralign.engine.run.recipe import load
from paralign.engine.run.replay import PackReport, Replay, verdict

from .pool import RankFailure, RankPool
from .test_soundness import QUIET, harmed, spoil_gradient
from .toy import make_toy, train_recipe, write_recipe

TP2_DP2 = {"tensor_model_parallel_size": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
SETTINGS: dict[str, Any] = {
    "train__eval_every_steps": 5,
    "train__generate_samples": 1,
    "train__generate_max_tokens": 2,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats, and one more with a word that the tokenizer does not know; the unknown token's embedding is finite, and
    too large for a gradient to be so."""
    directory = tmp_path_factory.mktemp("toy")
    make_toy(directory)
    turns = [{"role": "user", "content": "zebra"}, {"role": "assistant", "content": "red"}]
    with (directory / "chats.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    weights = directory / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][3] = 3e38
    save_file(tensors, weights, metadata={"format": "pt"})
    return directory


def replay_recipe(rank: int, world_size: int, recipe: Path, step: int) -> None:
    train(check(load(recipe), world_size), Stop(), local_rank=rank, replay_step=step)


def _files(run_dir: Path) -> dict[Path, bytes]:
    """All that the run has written, but for what replays leave."""
    return {
        path: path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and "replay" not in path.parts
    }


def _replayed(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / f"replay/step_{step:07d}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "layout", "n"), [("tp2-dp2", TP2_DP2, 4), ("vpp2", VPP2, 2)])
def test_the_sample_that_spoilt_a_step_is_found(
    name: str, layout: dict[str, Any], n: int, toy: Path, ranks: RankPool
) -> None:
    recipe = write_recipe(toy, name, layout, **SETTINGS, checkpoint__save_every_steps=None)
    with pytest.raises(RankFailure, match=r"step \d+: the gradient norm is (nan|inf)"):
        ranks.run(n, train_recipe, recipe)
    before = _files(toy / name)
    logged = {line["step"]: line for line in read_metrics(toy / name) if "loss" in line}
    spoilt = max(line["step"] for line in read_metrics(toy / name))

    ranks.run(n, replay_recipe, recipe, spoilt)
    found = _replayed(toy / name, spoilt)
    assert [pack["samples"] for pack in found["samples"] if pack["largest_gradient"] is None] == [
        [f"{toy / 'chats.jsonl'}:121"]
    ]
    assert sum(pack["largest_gradient"] is None for pack in found["packs"]) == 1
    assert found["verdict"] == f"the fault is in a sample: {toy / 'chats.jsonl'}:121"

    if spoilt:  # a step before it: weights from the start, steps done again, nothing logged
        ranks.run(n, replay_recipe, recipe, spoilt - 1)
        found = _replayed(toy / name, spoilt - 1)
        assert (found["loss"], found["grad_norm"]) == (
            logged[spoilt - 1]["loss"],
            logged[spoilt - 1]["grad_norm"],
        )
        assert sum(pack["loss"] for pack in found["packs"]) == pytest.approx(found["loss"], rel=1e-6)
        assert found["samples"] == []
        assert "the step is what was logged, to the bit" in found["verdict"]
    assert _files(toy / name) == before


def test_a_fault_that_came_only_once_is_called_so(toy: Path, ranks: RankPool) -> None:
    settings = QUIET | {"train__max_steps": 3, "train__on_nonfinite": "skip", "train__global_batch_size": 2}
    recipe = write_recipe(toy, "once", {}, **settings)
    ranks.run(1, harmed, recipe, spoil_gradient, [1])
    ranks.run(1, replay_recipe, recipe, 1)
    verdict = _replayed(toy / "once", 1)["verdict"]
    assert "the fault came only once: logged were" in verdict
    assert "grad_norm not finite" in verdict


def test_a_weight_is_named_and_no_sample(tmp_path: Path, ranks: RankPool) -> None:
    make_toy(tmp_path)
    weights = tmp_path / "model/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, weights, metadata={"format": "pt"})
    ranks.run(1, replay_recipe, write_recipe(tmp_path, "bad", {}), 2)
    found = _replayed(tmp_path / "bad", 2)
    assert found["verdict"].startswith("the fault is in a weight, not in a sample: before step 0 ")
    assert "model.norm.weight (1 of " in found["verdict"]
    assert found["samples"] == found["packs"] == []


def test_a_pair_is_found_with_a_kept_reference(toy: Path, ranks: RankPool) -> None:
    pairs = [{"prompt": "red", "chosen": "red sun", "rejected": "sun"}] * 40
    pairs[17] = {"prompt": "zebra", "chosen": "red", "rejected": "blue"}
    (toy / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = write_recipe(
        toy,
        "dpo",
        {},
        objective={"name": "dpo", "beta": 0.1, "reference": "online"},
        data__train=str(toy / "pairs.jsonl"),
        data__validation={},
        train__max_steps=3,
        train__eval_every_steps=None,
    )
    step = next(n for n in range(2) if _spoilt(recipe, n))
    ranks.run(1, replay_recipe, recipe, step)
    found = _replayed(toy / "dpo", step)
    assert [pack["samples"] for pack in found["samples"] if pack["largest_gradient"] is None] == [
        [f"{toy / 'pairs.jsonl'}:18"]
    ]


def _spoilt(recipe: Path, step: int) -> bool:
    """Whether the step holds the pair with the unknown word."""
    cache = check(load(recipe), 1).caches["train"]
    epochs = Epochs(cache, global_batch_size=8, seed=3)
    packs = packs_of_step(len(epochs.plan(0)), 8, step)
    return any(cache.place(i).endswith(":18") for k in packs for i in epochs.plan(0).pack(k).tolist())


FINE = PackReport(
    0, 0, 1.0, 0.5, "decoder.layers.0.mlp.linear_fc1.weight", ("chats.jsonl:1", "chats.jsonl:2")
)
BAD = PackReport(0, 1, 1.0, math.nan, "output_layer.weight", ("chats.jsonl:3", "chats.jsonl:4"))
SAMPLE = PackReport(0, 1, math.nan, math.nan, "output_layer.weight", ("chats.jsonl:4",))
LOGGED = {"loss": 2.0, "grad_norm": 0.5}


def found(*packs: PackReport, loss: float = 2.0, norm: float = 0.5, **rest: Any) -> Replay:
    return Replay(7, loss, norm, packs, rest.pop("samples", ()), **rest)


@pytest.mark.parametrize(
    ("replay", "logged", "words"),
    [
        (
            found(weights=("lm_head.weight (1 of 9)",), weights_at=5),
            None,
            "in a weight.* step 5 .*lm_head.weight",
        ),
        (found(FINE, BAD, samples=(SAMPLE,), loss=math.nan), None, "in a sample: chats.jsonl:4$"),
        (
            found(FINE, BAD, loss=math.nan),
            None,
            "1 packs are not finite, and none of their samples is so alone",
        ),
        (
            found(FINE, norm=math.inf),
            None,
            "every pack is finite alone, and the sum of their gradients is not",
        ),
        (found(FINE), None, "the run logged nothing of this step"),
        (found(FINE), LOGGED, "to the bit"),
        (found(FINE), {"loss": 2.000001, "grad_norm": 0.5}, "but for rounding"),
        (
            found(FINE),
            {"loss": 2.0, "grad_norm": None},
            "only once: logged were loss 2.0, grad_norm not finite",
        ),
        (found(FINE), {"loss": 3035.0, "grad_norm": 0.5}, "the fault came only once"),
    ],
)
def test_a_fault_is_placed(replay: Replay, logged: dict[str, float | None] | None, words: str) -> None:
    assert re.search(words, verdict(replay, logged))
