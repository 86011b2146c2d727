"""`paralign data inspect` and `paralign data pack`: what a user sees before a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from paralign.engine.cli import app
from paralign.engine.data.cache import build_or_open
from paralign.engine.data.inspect import CONTEXT, LEARNED, inspect_set
from paralign.engine.data.statistics import set_statistics
from paralign.engine.run.recipe import load
from paralign.models.errors import DataError

from .conftest import chat


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", *arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_inspect_shows_what_is_learned_in_brackets(project: Path) -> None:
    shown = run("inspect", "recipe.yaml", "--samples", "1")
    assert "train.jsonl:1  " in shown
    assert "train.jsonl:2" not in shown
    assert "⟦yo⟧⟦<|im_end|>⟧" in shown
    assert "<|im_start|>user" in shown.replace(" ", "")
    assert "⟦hi⟧" not in shown
    assert "train.jsonl:7" in run("inspect", "recipe.yaml", "--line", "7")
    assert "chat.jsonl:1" in run("inspect", "recipe.yaml", "--set", "validation/chat")
    assert not (project / "cache").exists()


def test_inspect_colours_token_by_token_in_a_terminal(project: Path) -> None:
    data = load(project / "recipe.yaml").data
    blocks = list(inspect_set(data, "train", project / "model", n_samples=1, coloured=True))
    spans = [(blocks[1].plain[span.start : span.end], str(span.style)) for span in blocks[1].spans]
    learned = [(text, style) for text, style in spans if style in LEARNED]
    assert [text for text, _ in learned] == ["yo", "<|im_end|>"]
    assert learned[0][1] != learned[1][1]
    assert any(style == CONTEXT[1] for _, style in spans)


def test_inspect_says_what_is_wrong_and_goes_on(project: Path) -> None:
    records = [{"messages": [{"role": "assistant", "content": "yo"}]}, chat("hi"), chat("hi", "yo " * 99)]
    (project / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = run("inspect", "recipe.yaml", "--samples", "3", "data.format=messages")
    assert "train.jsonl:1: turn 0 is the first" in shown
    assert "0 learned; nothing to learn" in shown
    assert "longer than a pack of 64" in shown


def test_inspect_names_the_sets_there_are(project: Path) -> None:
    data = load(project / "recipe.yaml").data
    with pytest.raises(DataError, match="no set code; this recipe has train, validation/chat"):
        next(inspect_set(data, "code", project / "model", n_samples=1, coloured=False))


def test_pack_builds_the_caches_and_counts(project: Path) -> None:
    shown = run("pack", "recipe.yaml", "data.train=[{path: train.jsonl, weight: 2}, {path: chat.jsonl}]")
    assert "── train" in shown
    assert "── validation/chat" in shown
    assert "chat.jsonl" in shown
    assert len(list((project / "cache").iterdir())) == 2
    for word in ("packs", "learned", "in a pack", "cache", "tokens       samples"):
        assert word in shown


def test_statistics_are_those_of_the_first_epoch(project: Path) -> None:
    recipe = load(project / "recipe.yaml", ["data.train=[{path: train.jsonl, weight: 2}, chat.jsonl]"])
    cache = build_or_open(recipe.data, recipe.data.train, project / "model", progress=False)
    found = set_statistics("train", cache, global_batch_size=4, seed=1)
    assert [(source.name, source.samples, source.seen) for source in found.sources] == [
        ("train", 40, 80),
        ("chat", 4, 4),
    ]
    seen = np.where(cache.sources == 0, 2, 1)
    n_tokens = int((seen * cache.lengths).sum())
    assert found.utilisation == n_tokens / (found.packs * 64)
    assert found.loss_share == pytest.approx(int((seen * cache.n_loss).sum()) / n_tokens)
    assert found.steps == -(-found.packs // 4)
    assert found.samples_per_pack[1] == pytest.approx(84 / found.packs)
    assert sum(count for *_, count in found.histogram) == 44
    for low, high, count in found.histogram:
        assert count == np.count_nonzero((cache.lengths >= low) & (cache.lengths <= high))


PREFERENCES = {
    "dpo": [{"prompt": "hi", "chosen": "yo yo", "rejected": "yo"}, {"prompt": "hi", "chosen": "yo"}],
    "kto": [{"prompt": "hi", "completion": "yo", "label": i == 0} for i in range(2)],
}


@pytest.mark.parametrize(("objective", "kind"), [("dpo", "pairs, chosen"), ("kto", "labelled")])
def test_preferences_are_inspected_and_packed_too(project: Path, objective: str, kind: str) -> None:
    records = PREFERENCES[objective]
    (project / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    keys = (
        "objective={name: " + objective + ", beta: 0.1}",
        "data.train=pairs.jsonl",
        "data.validation={}",
        "train.eval_every_steps=null",
    )
    shown = run("inspect", "recipe.yaml", *keys)
    assert f"({kind})  pairs.jsonl:1" in shown
    assert "⟦yo⟧⟦<|im_end|>⟧" in shown
    assert ("pairs.jsonl:2: " in shown) == (objective == "dpo"), "a pair without its rejected answer"
    shown = run("pack", "recipe.yaml", *keys, "data.bad_record=skip")
    assert ("left out     1 that cannot be read" in shown) == (objective == "dpo")
    assert "in a pack" in shown


def test_the_commands_start_without_megatron(project: Path) -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from paralign.engine.cli import app\n"
        "for command in ('inspect', 'pack'):\n"
        "    assert CliRunner().invoke(app, ['data', command, 'recipe.yaml']).exit_code == 0\n"
        "assert 'megatron' not in sys.modules; assert 'pyarrow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
