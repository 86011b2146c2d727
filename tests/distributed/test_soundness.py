"""Numbers that are watched: weights that are not finite, copies that differ, spikes, and steps left out for ever."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from paralign.engine.checkpoint import store
from paralign.engine.observe.metrics import read_metrics
from paralign.engine.training import learner as learning

from .comparing import assert_weights_equal, metrics_of
from .pool import RankFailure, RankPool
from .toy import make_toy, train_recipe, write_recipe

MATRIX, NORM = "decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.1.input_layernorm.weight"
HF_NAMES = {
    MATRIX: "model.layers.1.mlp.down_proj.weight",
    NORM: "model.layers.1.input_layernorm.weight",
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
}
QUIET: dict[str, Any] = {"train__eval_every_steps": None, "checkpoint__save_every_steps": None}
SPIKE = {"window": 8, "threshold": 30, "action": "skip"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    make_toy(directory)
    return directory


def harmed(rank: int, world_size: int, recipe: Path, harm: Callable[..., Any], *options: Any) -> None:
    """Train, with `harm` done behind every backward pass: it may change model and sums."""
    run_step, done = learning.run_step, iter(range(1000))

    def with_harm(model: Any, batch: Any, objective: Any, **keys: Any) -> Any:
        sums = run_step(model, batch, objective, **keys)
        with torch.no_grad():
            harm(next(done), rank, model, sums, *options)
        return sums

    with patch.object(learning, "run_step", with_harm):
        train_recipe(rank, world_size, recipe)


def flip(step: int, rank: int, model: Any, sums: Any, at: int, victim: int, name: str) -> None:
    """A bit of the victim's copy."""
    if (step, rank) == (at, victim):
        weight = dict(model.named_weights())[name].view(-1)
        weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)[5] ^= 1 << 3


def raise_loss(step: int, rank: int, model: Any, sums: Any, at: Sequence[int]) -> None:
    if step in at:
        sums[0, 0] *= 500


def spoil_gradient(step: int, rank: int, model: Any, sums: Any, at: Sequence[int]) -> None:
    if step in at:
        next(model.named_weights())[1].main_grad.view(-1)[0] = float("nan")


def spoil_weight(step: int, rank: int, model: Any, sums: Any, at: int) -> None:
    """In a matrix, and in what its gradient would be."""
    if step == at:
        weight = dict(model.named_weights())[MATRIX]
        weight.view(-1)[7] = float("inf")
        weight.main_grad.view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("n", "layout", "dtype", "name", "victim", "words"),
    [
        (2, {}, "fp32", MATRIX, 1, r"ranks 0 \(.*\), 1 \(.*\) hold copies that differ, and nothing tells"),
        pytest.param(
            2, {}, "bf16", MATRIX, 0, r"the copy of rank 0 \(.*\) is wrong in 1 numbers, by the .* main weights",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2, {}, "bf16", MATRIX, 1, r"the copy of rank 1 \(.*\) is wrong in 1 numbers", marks=pytest.mark.slow
        ),
        pytest.param(
            3, {}, "fp32", MATRIX, 2, r"the copy of rank 2 \(.*\) is wrong, 2 of 3 are equal", marks=pytest.mark.slow
        ),
        pytest.param(
            4, {}, "fp32", MATRIX, 2, r"the copy of rank 2 \(.*\) is wrong, 3 of 4 are equal", marks=pytest.mark.slow
        ),
        pytest.param(
            2, {"tensor_model_parallel_size": 2}, "fp32", NORM, 1, r"ranks 0 .*, 1 .* hold copies that differ",
            marks=pytest.mark.slow,
        ),
        (2, {"tensor_model_parallel_size": 2}, "bf16", NORM, 1, r"the copy of rank 1 \(.*\) is wrong in 1 numbers"),
        pytest.param(
            4, {"tensor_model_parallel_size": 2}, "fp32", NORM, 3, r"the copy of rank 3 .* is wrong, 3 of 4",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4, {"pipeline_model_parallel_size": 2}, "bf16", MATRIX, 1, r"the copy of rank 1 .* is wrong in 1",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_copy_with_a_flipped_bit_ends_the_run_and_is_named(
    n: int,
    layout: dict[str, Any],
    dtype: str,
    name: str,
    victim: int,
    words: str,
    toy: Path,
    ranks: RankPool,
) -> None:
    run = f"flip-{n}-{'-'.join(layout)}-{dtype}-{name}-{victim}"
    settings = QUIET | {"train__check_replicas_every_steps": 1, "train__max_steps": 4}
    settings |= {"model__dtype": dtype, "train__global_batch_size": 2 * n}
    recipe = write_recipe(toy, run, layout, **settings)
    expected = rf"step 2: copies of one weight differ: {HF_NAMES[name]}: {words}"
    with pytest.raises(RankFailure, match=expected):
        ranks.run(n, harmed, recipe, flip, 2, victim, name)
    assert not (toy / run / "checkpoints").exists()
    assert any("copies of one weight differ" in line.get("note", "") for line in read_metrics(toy / run))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_copy_of_tied_embeddings_is_compared_over_stages(
    victim: int, tmp_path: Path, ranks: RankPool
) -> None:
    make_toy(tmp_path, family="qwen2")
    recipe = write_recipe(
        tmp_path,
        "tied",
        {"pipeline_model_parallel_size": 2},
        train__check_replicas_every_steps=1,
        **QUIET | {"model__dtype": "bf16"},
    )
    with pytest.raises(
        RankFailure, match=rf"model.embed_tokens.weight: the copy of rank {victim} \(.*\) is wrong"
    ):
        ranks.run(2, harmed, recipe, flip, 2, victim, "embedding.word_embeddings.weight")


@pytest.mark.slow
def test_comparing_copies_changes_no_number(toy: Path, ranks: RankPool) -> None:
    layout = {"tensor_model_parallel_size": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}
    for name, every in (("compared", 1), ("not-compared", None)):
        recipe = write_recipe(toy, name, layout, train__check_replicas_every_steps=every, **QUIET)
        ranks.run(4, train_recipe, recipe)
    assert metrics_of(toy / "compared") == metrics_of(toy / "not-compared")


def test_a_spike_is_left_out_as_if_its_gradient_were_not_finite(toy: Path, ranks: RankPool) -> None:
    """Weights and optimizer stay as they were: the steps after it are the same ones."""
    settings = QUIET | {"train__max_steps": 13, "train__on_nonfinite": "skip"}
    ranks.run(2, harmed, write_recipe(toy, "spike", {}, train__spike=SPIKE, **settings), raise_loss, [10])
    ranks.run(2, harmed, write_recipe(toy, "nan", {}, train__spike=None, **settings), spoil_gradient, [10])
    assert_weights_equal(toy / "spike/hf/final", toy / "nan/hf/final")
    lines = read_metrics(toy / "spike")
    assert [line["step"] for line in lines if line.get("skipped")] == [10]
    # On a busy machine a rank may be told to be slow, too.
    (note,) = (line["note"] for line in lines if line.get("note", "").startswith("step "))
    assert note.startswith("step 10: the loss ")
    assert "chats.jsonl:" in note


@pytest.mark.slow
def test_a_resumed_run_has_the_window_of_its_checkpoint(toy: Path, ranks: RankPool) -> None:
    settings = QUIET | {"train__max_steps": 13, "train__spike": SPIKE, "checkpoint__save_every_steps": 9}
    ranks.run(2, harmed, write_recipe(toy, "straight", {}, **settings), raise_loss, [10])
    shutil.copytree(toy / "straight/checkpoints/iter_0000009", toy / "again/checkpoints/iter_0000009")
    ranks.run(2, harmed, write_recipe(toy, "again", {}, **settings), raise_loss, [1])
    theirs = {key: value for key, value in metrics_of(toy / "straight").items() if key[0] >= 9}
    assert (10, "skipped") in theirs
    assert metrics_of(toy / "again") == theirs
    assert_weights_equal(toy / "again/hf/final", toy / "straight/hf/final")


@pytest.mark.slow
@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_spike_is_told_or_ends_the_run(action: str, toy: Path, ranks: RankPool) -> None:
    name = f"spike-{action}"
    spike = SPIKE | {"action": action}
    recipe = write_recipe(toy, name, {}, train__spike=spike, train__max_steps=12, **QUIET)
    if action == "stop":
        with pytest.raises(
            RankFailure, match=r"step 10: the loss .* standard deviations above .*chats.jsonl:"
        ):
            ranks.run(2, harmed, recipe, raise_loss, [10])
        root = toy / name / "checkpoints"
        assert store.latest(root) == root / "iter_0000010"
        return
    ranks.run(2, harmed, recipe, raise_loss, [10])
    assert any("step 10: the loss" in line.get("note", "") for line in read_metrics(toy / name))
    undisturbed = write_recipe(toy, "undisturbed", {}, train__spike=None, train__max_steps=12, **QUIET)
    ranks.run(2, train_recipe, undisturbed)
    assert_weights_equal(toy / name / "hf/final", toy / "undisturbed/hf/final")


def test_a_run_that_skips_for_ever_ends(toy: Path, ranks: RankPool) -> None:
    settings = QUIET | {"train__on_nonfinite": "skip", "train__max_skipped_steps": 3}
    recipe = write_recipe(toy, "for-ever", {}, **settings)
    with pytest.raises(RankFailure, match=r"step 6: the gradient norm is nan.*3 steps in a row were skipped"):
        ranks.run(1, harmed, recipe, spoil_gradient, [1, 2, 4, 5, 6, 7])
    assert not (toy / "for-ever/hf").exists()


def test_a_weight_that_is_not_finite_is_named_and_neither_saved_nor_exported(
    toy: Path, ranks: RankPool
) -> None:
    settings = QUIET | {"train__on_nonfinite": "skip", "checkpoint__export_every_steps": 6}
    recipe = write_recipe(toy, "inf", {"tensor_model_parallel_size": 2}, **settings)
    with pytest.raises(RankFailure, match=rf"step 3: weights are not finite: {HF_NAMES[MATRIX]} \(\d"):
        ranks.run(2, harmed, recipe, spoil_weight, 3)
    assert not (toy / "inf/checkpoints").exists()
    assert not (toy / "inf/hf").exists()


@pytest.mark.parametrize("number", [float("inf"), pytest.param(float("nan"), marks=pytest.mark.slow)])
def test_a_weight_that_is_not_finite_is_refused_at_the_start(
    number: float, tmp_path: Path, toy: Path, ranks: RankPool
) -> None:
    shutil.copytree(toy, tmp_path / "toy", ignore=shutil.ignore_patterns("checkpoints", "hf", "*.yaml"))
    directory = tmp_path / "toy"
    weights = directory / "model/model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.2.self_attn.k_proj.weight"][1, 2] = number
    save_file(tensors, weights, metadata={"format": "pt"})
    recipe = write_recipe(directory, "bad", {"tensor_model_parallel_size": 2}, **QUIET)
    expected = (
        rf"{directory}/model: weights are not finite: model.layers.2.self_attn.k_proj.weight "
        rf"\(1 of [\d,]+ numbers, the first {number} at \[1, 2\]; rank 0\)"
    )
    with pytest.raises(RankFailure, match=expected):
        ranks.run(2, train_recipe, recipe)
