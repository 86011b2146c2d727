"""Every error of a recipe names place, value, rule and remedy, and all are told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BeforeValidator, Field, model_validator

from paralign.engine.config.decoding import Section, decode
from paralign.engine.config.recipe_file import apply_overrides, load_recipe_file
from paralign.models.errors import RecipeError


class Inner(Section):
    """An inner section.

    Attributes:
        size: how large it is,
            in metres.
        rate: how fast.
    """

    size: int = Field(ge=1)
    rate: float = 0.5
    style: Literal["cosine", "linear"] = "cosine"
    template: Literal["own", "other"] | Path = "own"
    files: Annotated[tuple[Path, ...], BeforeValidator(lambda x: (x,) if isinstance(x, str) else x)] = ()
    on: bool = True

    @model_validator(mode="after")
    def _agree(self) -> Inner:
        if self.rate > self.size:
            raise ValueError("rate is above size; lower it")
        return self


class Outer(Section):
    inner: Inner
    name: str = ""
    sets: dict[str, Path] = {}  # noqa: RUF012


def decoded(tmp_path: Path, text: str, *overrides: str) -> Outer:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return decode(Outer, *apply_overrides(*load_recipe_file(path), overrides), path)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        decoded(tmp_path, text, *overrides)
    return str(raised.value).replace(f"{tmp_path}/", "").split("\n")


def test_a_good_recipe_becomes_typed(tmp_path: Path) -> None:
    outer = decoded(tmp_path, "inner:\n  size: 3\n  rate: 1\n  files: a.jsonl\n", "inner.template=b.jinja")
    assert outer.inner == Inner(size=3, rate=1.0, files=(Path("a.jsonl"),), template=Path("b.jinja"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("inner:\n  size: two\n", 'x.yaml:2 inner.size: read "two"; expected an integer'),
        ("inner:\n  size: 2.5\n", "x.yaml:2 inner.size: read 2.5; expected an integer"),
        ("inner:\n  size: 0\n", "x.yaml:2 inner.size: read 0; expected at least 1"),
        ("inner:\n  size: 2\n  on: 2\n", "x.yaml:3 inner.on: read 2; expected true or false"),
        ("inner:\n  size: 2\n  rate: high\n", 'x.yaml:3 inner.rate: read "high"; expected a number'),
        (
            "inner:\n  size: 2\n  style: cosin\n",
            'x.yaml:3 inner.style: read "cosin"; expected cosine or linear; did you mean cosine?',
        ),
        ("inner:\n  size: 2\n  sise: 2\n", "x.yaml:3 inner.sise: unknown key; did you mean size?"),
        ("inner:\n  size: 2\nrate: 2\n", "x.yaml:3 rate: unknown key here; did you mean inner.rate?"),
        ("inner:\n  size: 2\nqqq: 2\n", "x.yaml:3 qqq: unknown key; the keys here are inner, name, sets"),
        ("inner:\n  rate: 1\n", "x.yaml:1 inner.size: missing: how large it is, in metres"),
        ("name: x\n", "x.yaml inner: missing"),
        ("inner:\n", "x.yaml:1 inner: read null; expected a section of keys and values"),
        ("inner:\n  size: 1\n  rate: 2\n", "x.yaml:1 inner: rate is above size; lower it"),
        ("inner:\n  size: 1\n  files:\n  - a\n  - 2\n", "x.yaml:5 inner.files[1]: read 2; expected a path"),
        ("inner: {size: 1}\nsets:\n  a: 1\n", "x.yaml:3 sets.a: read 1; expected a path"),
        (
            "inner: {size: 1, template: 3}\n",
            "x.yaml:1 inner.template: read 3; expected own or other or a path",
        ),
    ],
)
def test_each_problem_names_place_value_and_rule(tmp_path: Path, text: str, line: str) -> None:

    assert problems(tmp_path, text) == [line]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    lines = problems(tmp_path, "inner:\n  size: x\n  on: x\nnam: y\n", "inner.rate=fast", "name=3")
    assert lines == [
        'x.yaml:2 inner.size: read "x"; expected an integer',
        'command line: inner.rate=fast: read "fast"; expected a number',
        'x.yaml:3 inner.on: read "x"; expected true or false',
        "command line: name=3: read 3; expected text",
        "x.yaml:4 nam: unknown key; did you mean name?",
    ]


def test_variables_and_home_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    outer = decoded(tmp_path, 'inner: {size: 1, files: ["${DATA}/a", "~/b"]}\n')
    assert outer.inner.files == (Path("/data/a"), Path("/home/me/b"))


def test_an_unset_variable_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    lines = problems(tmp_path, "inner:\n  size: 1\nname: ${NOWHERE}/x\n")
    assert lines == ["x.yaml:3 name: the environment variable NOWHERE is not set; export it"]


def test_a_section_never_changes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        decoded(tmp_path, "inner: {size: 1}").inner.size = 2  # type: ignore[misc]
