"""Bad input through real launches: one clear error, exit code 2, no process left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .pool import RankFailure, RankPool
from .toy import forget_checksums, make_toy, train_recipe, write_recipe

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    make_toy(directory, n_chats=40)
    return directory


def _launch(recipe: Path, world_size: int = 2) -> subprocess.CompletedProcess[str]:
    """Ranks without the check that `paralign train` makes first: as torchrun and srun start them."""
    code = (
        "import sys; from pathlib import Path; from paralign.engine.processes.launch import run_local; "
        f"sys.exit(run_local(Path({str(recipe)!r}), [], {world_size}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def _assert_one_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error:") == 1, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def _left_over(recipe: Path) -> str:
    return subprocess.run(["pgrep", "-f", str(recipe)], capture_output=True, text=True).stdout


@pytest.mark.slow
def test_truncated_shard_under_ranks(toy: Path) -> None:
    broken = toy / "broken"
    shutil.copytree(toy / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    recipe = write_recipe(toy, "truncated", TP2, model__hf=str(broken))
    _assert_one_error(_launch(recipe), "model.safetensors: ", "its header says", "download it again")
    assert _left_over(recipe) == ""


def test_malformed_line_under_ranks(toy: Path) -> None:
    lines = (toy / "chats.jsonl").read_text().splitlines()
    lines[17] = lines[17][:-5]
    (toy / "malformed.jsonl").write_text("\n".join(lines))
    recipe = write_recipe(toy, "malformed", TP2, data__train=str(toy / "malformed.jsonl"))
    _assert_one_error(_launch(recipe), "malformed.jsonl:18")


@pytest.mark.slow
def test_layout_that_does_not_divide_under_ranks(toy: Path) -> None:
    recipe = write_recipe(toy, "layout", {"tensor_model_parallel_size": 4})
    _assert_one_error(_launch(recipe), "tp 4 × pp 1 = 4 does not divide 2 GPUs")


def test_paralign_train_checks_before_it_starts_ranks(toy: Path) -> None:
    recipe = write_recipe(toy, "unknown-key", TP2, optimizer__weight_dacay=0.1)
    command = [sys.executable, "-m", "paralign.engine.cli", "train", str(recipe)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    _assert_one_error(result, "unknown-key.yaml:", "did you mean weight_decay")


def test_checkpoint_of_another_model(toy: Path, ranks: RankPool) -> None:
    recipe = write_recipe(
        toy, "another", {}, train__max_steps=1, checkpoint__save_every_steps=1, optimizer__lr_warmup_steps=0
    )
    ranks.run(1, train_recipe, recipe)
    forget_checksums(toy / "another/checkpoints/iter_0000001")
    config = toy / "another/checkpoints/iter_0000001/hf/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 6}))
    with pytest.raises(
        RankFailure, match="checkpoint of another model: num_layers 6 where the recipe's has 4"
    ):
        ranks.run(1, train_recipe, recipe)
