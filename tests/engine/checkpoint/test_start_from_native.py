"""A recipe starts from a native checkpoint as from the Hugging Face directory that it was made of."""

from pathlib import Path

import pytest

from paralign.engine.checkpoint.source import open_source
from paralign.engine.run.check import check
from paralign.engine.run.recipe import load
from paralign.models.errors import CheckpointError
from paralign.models.weights import bit_equal

OVERRIDES = ["model.hf=native", "model.init=weights"]


def test_config_tokenizer_and_weights_are_found(native: Path) -> None:
    recipe = load(Path("recipe.yaml"), OVERRIDES)
    assert recipe.tokenizer_dir == native / "hf"
    assert check(recipe).parameters > 0
    ours, theirs = open_source(native), open_source(Path("model"))
    for rule in theirs.rules:
        for rank in range(2):
            assert bit_equal(rule.slice(ours.read, rank, 2), rule.slice(theirs.read, rank, 2))


def test_a_checkpoint_that_was_not_finished_is_refused(native: Path) -> None:
    (native / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"native: not a checkpoint, .metadata is missing"):
        check(load(Path("recipe.yaml"), OVERRIDES))
