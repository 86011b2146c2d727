"""A run that an older commit began goes on under this code to the bit: the guard of every change of the house.

Two things are held to a tolerance: the gradient norm, whose squares are added up in fp64 now, and a run that clips
by it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .comparing import assert_weights_equal, metrics_of
from .old_checkpoints import CASES, ROOT, Case, write_old_checkpoints
from .pool import RankPool
from .toy import train_recipe

OLD = "40ec5b1"


@pytest.fixture(scope="module")
def old_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    known = subprocess.run(
        ["git", "-C", str(ROOT), "cat-file", "-e", f"{OLD}^{{commit}}"], capture_output=True
    )
    if known.returncode:
        pytest.skip(f"commit {OLD} is not in this checkout's history")
    directory = tmp_path_factory.mktemp("old")
    write_old_checkpoints(OLD, directory)
    return directory


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_of_an_older_commit_goes_on_to_the_bit(case: Case, old_runs: Path, ranks: RankPool) -> None:
    straight, resumed = old_runs / case.name, old_runs / f"{case.name}-resumed"
    shutil.copytree(straight / "checkpoints/iter_0000005", resumed / "checkpoints/iter_0000005")
    # Its tokens, and what a reference model says of them, are made anew as well.
    recipe = case.recipe(old_runs, resumed.name, checkpoint__save_every_steps=None)
    ranks.run(case.world_size, train_recipe, recipe)
    theirs = {key: value for key, value in metrics_of(straight).items() if key[0] >= 5}
    assert {step for step, _ in theirs} == set(range(5, 11))
    ours = metrics_of(resumed)
    if case.clips:  # see Case
        assert ours == pytest.approx(theirs, rel=1e-5)
        return
    norms = {key for key in theirs if key[1] == "grad_norm"}
    assert {key: ours[key] for key in norms} == pytest.approx({key: theirs[key] for key in norms}, rel=1e-6)
    assert {key: ours[key] for key in ours.keys() - norms} == {
        key: theirs[key] for key in theirs.keys() - norms
    }
    assert_weights_equal(resumed / "hf/final", straight / "hf/final")
