"""A rank as it is started: what it says where it cannot begin."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paralign.engine.processes.stop import Stop
from paralign.engine.run.rank import run


@pytest.mark.parametrize("arguments", [[], ["--replay-step=3"], ["--resave"]])
def test_a_rank_without_a_recipe_says_so_and_exits_with_2(
    project: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        run(arguments, Stop())
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: no recipe given; expected RECIPE [--replay-step=N | --resave] [key.sub=value …]\n"
    )
