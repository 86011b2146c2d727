"""What only a run on GPUs does, done on the CPU: a pipeline's messages in batches, torch's choice of a loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paralign.engine.training import build

from .pool import RankPool
from .toy import losses_of, make_toy, train_recipe, write_recipe


def _as_on_gpus(rank: int, world_size: int, recipe: Path) -> list[str]:
    """Train with messages in batches; who waited for the whole GPU, and which of AdamW's loops ran."""
    calls: list[str] = []

    def noted(name: str, theirs: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return theirs(*arguments, **options)

        return call

    adam: Any = sys.modules["torch.optim.adam"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "ON_HOST", False)
        patched.setattr(sys.modules["paralign_host"], "synchronize", noted("synchronize", lambda: None))
        patched.setattr(adam, "_default_to_fused_or_foreach", lambda *_, **__: (False, True))
        for loop in ("_single_tensor_adam", "_multi_tensor_adam"):
            patched.setattr(adam, loop, noted(loop, getattr(adam, loop)))
        train_recipe(rank, world_size, recipe)
    return calls


def test_a_pipeline_waits_for_messages_and_not_for_the_gpu(tmp_path: Path, ranks: RankPool) -> None:
    make_toy(tmp_path)

    def recipe(name: str) -> Path:
        return write_recipe(
            *(tmp_path, name, {"pipeline_model_parallel_size": 2}),
            train__max_steps=4,
            train__eval_every_steps=None,
            checkpoint__save_every_steps=None,
        )

    ranks.run(2, train_recipe, recipe("cpu"))
    for calls in ranks.run(2, _as_on_gpus, recipe("gpu")):
        assert set(calls) == {"_single_tensor_adam"}, (
            "one parameter at a time, without temporaries of them all"
        )
    assert losses_of(tmp_path / "gpu") == losses_of(tmp_path / "cpu")
