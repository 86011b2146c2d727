"""Any recipe ends in a report or in one error, soon; see faulty_recipes.py. `make test-slow` runs the long half."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest

from paralign.engine.cli import main

from ..conftest import RECIPE
from .faulty_recipes import OVERRIDES, mutated, texts, with_values

SECONDS = 10


def check(capsys: pytest.CaptureFixture[str], name: str, content: bytes, *overrides: str) -> str | None:
    """What is wrong with how `paralign check` took a recipe; None if nothing is."""
    Path("faulty.yaml").write_bytes(content)
    sys.argv = ["paralign", "check", "faulty.yaml", "--", *overrides]
    began = time.process_time()
    try:
        main()
        code: object = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException as error:
        return f"{name}: {type(error).__name__}: {error!s:.200}"
    seconds, said = time.process_time() - began, capsys.readouterr()
    if seconds > SECONDS:
        return f"{name}: {seconds:.1f} s"
    if code not in (0, 2) or (code == 2 and said.err.count("error: ") != 1):
        return f"{name}: exit code {code}: {said.err[-200:]}"
    if len(said.err) > 10_000:
        return f"{name}: an error of {len(said.err)} characters"
    return None


def wrong(capsys: pytest.CaptureFixture[str], cases: Iterable[tuple[str, bytes]]) -> list[str]:
    return [found for name, content in cases if (found := check(capsys, name, content))]


@pytest.fixture(autouse=True)
def _arguments(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])


def test_files_that_are_no_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert wrong(capsys, texts(RECIPE, many=500).items()) == []


def test_overrides_of_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    found = [check(capsys, f"{override:.60}", RECIPE.encode(), override) for override in OVERRIDES]
    assert [text for text in found if text] == []


def test_some_bad_values_and_mutations(capsys: pytest.CaptureFixture[str]) -> None:
    assert wrong(capsys, islice(with_values(RECIPE, seed=1), 60)) == []
    assert wrong(capsys, islice(mutated(RECIPE, seed=1), 30)) == []


@pytest.mark.parametrize("name", ["directory", "/dev/zero", "pipe", "nowhere", "n" * 300, "loop"])
def test_a_path_that_is_no_recipe(name: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("directory").mkdir()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    sys.argv = ["paralign", "check", name]
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "cannot read the recipe" in capsys.readouterr().err
