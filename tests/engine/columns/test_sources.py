"""Who gives which column: orders, and recipes that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paralign.engine.batch import Column
from paralign.engine.columns.sources import BASELINE, REFERENCE, Source, in_order
from paralign.engine.columns.sources import DATA as DATA_OF_KINDS
from paralign.engine.data.epochs import Share
from paralign.engine.data.loader import PackLoader
from paralign.engine.objectives.sft import SFT
from paralign.engine.run import check as module
from paralign.engine.run.check import check, open_set, sources_of_columns
from paralign.engine.run.recipe import load
from paralign.models.errors import RecipeError

DATA = Source("the data", gives=frozenset({Column.PAIR, Column.ANSWER}))
NEEDS = {Column.PAIR, Column.BASELINE, Column.REF_LOGPROB}


def test_a_column_is_filled_behind_those_that_it_is_made_of() -> None:
    assert in_order(NEEDS, DATA, [BASELINE, REFERENCE]) == [REFERENCE, BASELINE]
    assert in_order({Column.BASELINE}, DATA, [BASELINE, REFERENCE]) == [REFERENCE, BASELINE]
    assert in_order({Column.PAIR}, DATA, [BASELINE, REFERENCE]) == []


def test_a_column_that_nothing_gives_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"the objective needs column score, which nothing gives; there are "
    ):
        in_order({Column.SCORE}, DATA, [REFERENCE])
    with pytest.raises(
        RecipeError, match=r"the policy's baseline needs column ref_logprob, which nothing gives"
    ):
        in_order({Column.BASELINE}, DATA, [BASELINE])


def test_two_that_give_one_column_are_refused() -> None:
    other = Source("a file", gives=frozenset({Column.REF_LOGPROB}))
    with pytest.raises(
        RecipeError, match=r"column ref_logprob is given by the reference model and by a file"
    ):
        in_order({Column.PAIR}, DATA, [REFERENCE, other])
    with pytest.raises(RecipeError, match=r"column pair is given by the data and by a file; keep one"):
        in_order(set(), DATA, [Source("a file", gives=frozenset({Column.PAIR}))])


def test_a_circle_is_refused() -> None:
    one = Source("one", gives=frozenset({Column.SCORE}), needs=frozenset({Column.MARGIN}))
    two = Source("two", gives=frozenset({Column.MARGIN}), needs=frozenset({Column.SCORE}))
    with pytest.raises(RecipeError, match=r"the objective needs two needs one needs two; break the circle"):
        in_order({Column.MARGIN}, DATA, [one, two])


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("sft", []),
        ("{name: dpo, beta: 0.1}", [REFERENCE]),
        ("{name: kto, beta: 0.1}", [REFERENCE, BASELINE]),
        ("{name: orpo, beta: 0.1}", []),
        ("{name: reward, alpha: 0}", []),
    ],
)
def test_what_recipes_come_to(project: Path, objective: str, expected: list[Source]) -> None:
    assert sources_of_columns(load(Path("recipe.yaml"), [f"objective={objective}"])) == expected


def test_no_source_is_promised_where_data_have_one_only() -> None:
    for data in DATA_OF_KINDS.values():
        with pytest.raises(RecipeError, match="needs column source, which nothing gives"):
            in_order({Column.SOURCE}, data, [])


def test_packs_have_what_a_chosen_filler_needs_of_the_data(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {"prompt": "hi", "chosen": "yo yo", "rejected": "yo", "margin": 2.5}
    (project / "train.jsonl").write_text(json.dumps(pair) + "\n")
    recipe = load(Path("recipe.yaml"), ["objective={name: dpo, beta: 0.1}"])
    monkeypatch.setattr(module, "REFERENCE", replace(REFERENCE, needs=frozenset({Column.MARGIN})))
    cache = open_set(recipe, recipe.data.train, progress=False)
    share, cpu = Share(0, 1, 1), torch.device("cpu")
    step = PackLoader(cache, global_batch_size=1, seed=1, share=share, device=cpu).step(0)
    assert step.micro_batches[0].columns[Column.MARGIN].tolist() == [2.5]


def test_check_refuses_before_anything_is_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFT, "needs", frozenset({Column.PAIR}))
    (project / "train.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"the objective needs column pair, which nothing gives"):
        check(load(Path("recipe.yaml"), ()))
