"""The command line: what a user types, what is printed, what the exit code is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paralign import __version__
from paralign.engine.cli import app, main
from paralign.engine.kernels import library
from paralign.engine.processes import launch
from paralign.models.errors import LayoutError


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_version() -> None:
    assert run("--version").output == f"paralign {__version__}\n"


def test_check_prints_the_report(project: Path) -> None:
    result = run("check", "recipe.yaml", "train.epochs=3", "--gpus", "4")
    assert result.exit_code == 0, result.output
    assert "4 GPUs = tp 2 × pp 1 × dp 2" in result.output
    assert "3 epochs" in result.output


def test_train_checks_first_and_starts_one_copy_of_the_model(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(launch, "run_local", lambda *arguments: started.append(arguments) or 3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert run("train", "recipe.yaml", "train.seed=5").exit_code == 3
    assert started == [(Path("recipe.yaml"), ["train.seed=5"], 2)]
    run("train", "recipe.yaml", "--nproc", "4")
    assert started[1][2] == 4


def test_bad_input_ends_before_any_rank_starts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run_local", lambda *_: pytest.fail("a rank was started"))
    assert isinstance(run("train", "recipe.yaml", "--nproc", "3").exception, LayoutError)


def test_kernels_that_are_required_are_there_before_any_rank_starts(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "run_local", lambda *_: pytest.fail("a rank was started"))
    monkeypatch.setattr(library, "LIBRARY", project / "no.so")
    library.find_library.cache_clear()
    refused = run("train", "recipe.yaml", "model.kernels=required").exception
    library.find_library.cache_clear()
    assert "model.kernels: required, but they are not built" in str(refused)


def test_train_refuses_to_nest(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    result = run("train", "recipe.yaml")
    assert "already one of 8" in str(result.exception)


def test_an_error_ends_in_a_message_and_exit_code_2(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["paralign", "check", "recipe.yaml", "data.train=[a]", "optimizer.lrr=1"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: command line: optimizer.lrr=1: unknown key; did you mean lr?\n"
    )


def test_an_unknown_command_is_a_usage_error() -> None:
    assert run("trian").exit_code == 2
