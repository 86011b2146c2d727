"""The long half of tests/engine/config/test_faulty_recipes.py: more values, more mutations."""

from __future__ import annotations

import sys
from itertools import islice

import pytest

from ..engine.config.faulty_recipes import mutated, texts, with_values
from ..engine.config.test_faulty_recipes import wrong
from ..engine.conftest import RECIPE, project

__all__ = ["project"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("seed", [2, 3])
def test_many_bad_values_and_mutations(
    seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    assert wrong(capsys, texts(RECIPE, many=15_000).items()) == []
    assert wrong(capsys, islice(with_values(RECIPE, seed), 400)) == []
    assert wrong(capsys, islice(mutated(RECIPE, seed), 400)) == []
