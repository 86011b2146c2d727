"""The documentation is run: shell blocks as they stand on the demo's files, other commands for their options.

`paralign train` and torchrun go through the command line up to the start of ranks; those of the pool run what would
have been started.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from paralign.engine.cli import app
from paralign.engine.data.render import template_text
from paralign.engine.processes import launch
from paralign.engine.processes.stop import Stop
from paralign.engine.run.check import check
from paralign.engine.run.rank import replay_step_of, train
from paralign.engine.run.recipe import load
from paralign.tools.demo import make_data, make_model
from paralign.tools.recipe_reference import reference

from .pool import RankPool

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(ROOT.glob("docs/*.md"))
EVERY_KEY = "## Every key\n\n"
# Of the demo's data and packs so much only: the commands are what is tested. One process that tokenises starts none.
LINES = 80
PACKS, SMALL_PACKS = "tokens_per_pack: 1024\n", "tokens_per_pack: 128\n  workers: 1\n"


def _blocks(page: Path) -> list[tuple[str, list[str]]]:
    """Language and lines, without comments, of each fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [
        (language, [line.split("  #")[0].strip() for line in text.splitlines()]) for language, text in found
    ]


def run_rank(rank: int, world_size: int, top: Path, recipe: Path, arguments: Sequence[str]) -> None:
    os.chdir(top)  # the pool was forked elsewhere
    step, overrides = replay_step_of(arguments)
    train(check(load(recipe, overrides), world_size), Stop(), local_rank=rank, replay_step=step)


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: RankPool) -> Path:
    """What a reader has in the current directory behind the demo's first stage, with a model that learned nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for path in (tmp_path / "recipes/demo").iterdir():
        assert PACKS in path.read_text()
        path.write_text(path.read_text().replace(PACKS, SMALL_PACKS))
    demo = tmp_path / "runs/demo"
    make_data(demo / "data")
    for path in (demo / "data").iterdir():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:LINES]))
    make_model(demo / "model", demo / "data/train.jsonl")
    shutil.copytree(demo / "model", demo / "hf/final")
    (demo / "hf/final/chat_template.jinja").write_text(template_text("chatml") or "")

    def on_the_pool(recipe: Path, overrides: Sequence[str], nproc: int) -> int:
        ranks.run(nproc, run_rank, tmp_path, recipe, list(overrides))
        return 0

    monkeypatch.setattr(launch, "run_local", on_the_pool)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_shell_blocks_run(page: Path, top: Path, ranks: RankPool) -> None:
    commands = [line for language, lines in _blocks(page) if language == "bash" for line in lines if line]
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "torchrun":
            assert arguments[:4:2] == ["--nproc_per_node", "-m"]
            assert arguments[3] == "paralign.engine.run"
            ranks.run(int(arguments[1]), run_rank, top, Path(arguments[4]), arguments[5:])
            continue
        assert program == "paralign", command
        if arguments[0] == "score":  # opens a process group of its own
            scoring = mp.get_context("fork").Process(target=app, args=(arguments,))
            scoring.start()
            scoring.join()
            assert scoring.exitcode == 0, command
            continue
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (command, result.output, result.exception)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_commands_name_what_there_is(page: Path) -> None:
    lines = [line for _, block in _blocks(page) for line in block if line.startswith("paralign ")]
    for line in lines:
        command = typer.main.get_command(app)
        for word in line.split()[1:]:
            inner = getattr(command, "commands", {})
            if word in inner:
                command = inner[word]
        known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= known, line


def test_every_key_is_described() -> None:
    page = ROOT / "docs/recipes.md"
    text, mark, keys = page.read_text(encoding="utf-8").partition(EVERY_KEY)
    if os.environ.get("RENEW_GOLDEN"):
        page.write_text(f"{text}{mark}{reference()}", encoding="utf-8")
        return
    assert keys == reference(), "renew by RENEW_GOLDEN=1"


def test_messages_are_those_of_the_sources() -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for room in ("engine", "models")
        for path in (ROOT / room).rglob("*.py")
    )
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(messages) > 15
    assert [message for message in messages if message not in joined] == []
