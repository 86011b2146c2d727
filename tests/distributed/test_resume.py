"""Resuming: at the same layout equal to the bit, at any other the same samples and the same losses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paralign.engine.checkpoint import store
from paralign.engine.convert import convert
from paralign.engine.observe.metrics import read_metrics

from .pool import RankFailure, RankPool
from .toy import make_toy, train_recipe, write_recipe

TP2_PP2_DP2 = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "TP4": (4, {"tensor_model_parallel_size": 4}),
    "PP2×VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "DP4": (4, {}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """Ten steps without a break at TP2×PP2×DP2, the state after five kept; tied embeddings and biases."""
    directory = tmp_path_factory.mktemp("toy")
    make_toy(directory, family="qwen2")
    ranks.run(8, train_recipe, write_recipe(directory, "straight", TP2_PP2_DP2))
    return directory


def _metrics(run_dir: Path) -> dict[tuple[int, str], float]:
    ignored = {"step", "time", "tokens_per_second", "tflops_per_gpu", "peak_memory_gb"}
    return {
        (line["step"], name): value
        for line in read_metrics(run_dir)
        for name, value in line.items()
        if name not in ignored
    }


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors of a Hugging Face directory, from however many files."""
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def _assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def _copy_first_checkpoint(directory: Path, name: str) -> None:
    root = directory / name / "checkpoints"
    root.mkdir(parents=True)
    shutil.copytree(directory / "straight/checkpoints/iter_0000005", root / "iter_0000005")


@pytest.mark.parametrize("async_save", [False, True])
def test_same_layout_is_equal_to_the_bit(trained: Path, async_save: bool, ranks: RankPool) -> None:
    name = f"killed-{async_save}"
    recipe = write_recipe(trained, name, TP2_PP2_DP2, checkpoint__async_save=async_save)
    with pytest.raises(RankFailure):
        ranks.run(8, train_recipe, recipe, 8)  # killed in its ninth step
    assert store.latest(trained / name / "checkpoints") == trained / name / "checkpoints/iter_0000005"
    # Saving again costs a process a rank; the unbroken run has shown it.
    ranks.run(8, train_recipe, write_recipe(trained, name, TP2_PP2_DP2, checkpoint__save_every_steps=None))

    assert _metrics(trained / name) == _metrics(trained / "straight")
    _assert_equal(_weights(trained / name / "hf/final"), _weights(trained / "straight/hf/final"))


@pytest.mark.parametrize("layout", list(OTHERS))
def test_another_layout_goes_on_alike(trained: Path, layout: str, ranks: RankPool) -> None:
    world_size, keys = OTHERS[layout]
    _copy_first_checkpoint(trained, layout)
    recipe = write_recipe(trained, layout, keys, checkpoint__save_every_steps=None)
    ranks.run(world_size, train_recipe, recipe)
    resumed, straight = _metrics(trained / layout), _metrics(trained / "straight")
    assert min(step for step, _ in resumed) == 5
    for key, value in resumed.items():
        assert value == pytest.approx(straight[key], rel=1e-5), key  # samples and learning rate exactly


def test_convert_gives_the_export(trained: Path, tmp_path: Path) -> None:
    convert(trained / "straight/checkpoints/iter_0000010", tmp_path / "hf", progress=False)
    exported = trained / "straight/hf/final"
    _assert_equal(_weights(tmp_path / "hf"), _weights(exported))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (exported / name).read_bytes(), name


def test_other_data_is_refused(trained: Path, ranks: RankPool) -> None:
    _copy_first_checkpoint(trained, "other-data")
    recipe = write_recipe(trained, "other-data", {}, train__seed=4)
    with pytest.raises(RankFailure, match="samples would be skipped or seen twice; restore"):
        ranks.run(1, train_recipe, recipe)
