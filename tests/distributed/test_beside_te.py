"""Where Transformer Engine or apex can be imported: Adam's count of steps survives, into and out of a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from paralign.models import mcore

from .comparing import assert_weights_equal, metrics_of
from .pool import RankPool
from .test_kernels import train_recipe_fused
from .toy import make_toy, train_recipe, write_recipe


class TheirAdam(torch.optim.AdamW):
    """Made as theirs is."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **settings)


def train_beside_te(rank: int, world_size: int, recipe: Path, train: Callable[..., None]) -> None:
    """Train with megatron-core as it is after it has imported one of them."""
    with (
        mock.patch.multiple(mcore.optimizer, Adam=TheirAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(
            mcore.distrib_optimizer, Adam=TheirAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True
        ),
    ):
        train(rank, world_size, recipe)


@pytest.mark.parametrize("train", [train_recipe, train_recipe_fused], ids=["torch", "fused"])
def test_a_run_goes_on_to_the_bit(train: Callable[..., None], ranks: RankPool, tmp_path: Path) -> None:
    make_toy(tmp_path)
    keys: dict[str, Any] = {
        "model__dtype": "bf16",
        "train__max_steps": 6,
        "train__eval_every_steps": None,
        "checkpoint__save_every_steps": 3,
    }

    def run(name: str, *, beside_te: bool, after: str = "") -> Path:
        if after:
            half = "checkpoints/iter_0000003"
            shutil.copytree(tmp_path / after / half, tmp_path / name / half)
            keys["checkpoint__save_every_steps"] = None
        recipe = write_recipe(tmp_path, name, {}, **keys)
        if beside_te:
            ranks.run(1, train_beside_te, recipe, train)
        else:
            ranks.run(1, train, recipe)
        return tmp_path / name

    straight, beside = run("straight", beside_te=False), run("beside", beside_te=True)
    expected = metrics_of(straight)
    assert metrics_of(beside) == expected
    behind = {key: value for key, value in expected.items() if key[0] >= 3}
    assert behind
    for name, beside_te, after in (
        ("into", True, "straight"),
        ("out of", False, "beside"),
        ("within", True, "beside"),
    ):
        resumed = run(name, beside_te=beside_te, after=after)
        assert metrics_of(resumed) == behind, name
        assert_weights_equal(resumed / "hf/final", straight / "hf/final")
