"""YAML as it is meant: 1.2 scalars, places of keys, overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from paralign.engine.config.recipe_file import apply_overrides, dump_yaml, load_recipe_file
from paralign.models.errors import RecipeError


def read(tmp_path: Path, text: str) -> dict:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load_recipe_file(path)[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.5E3", 1500.0),
        ("-.5", -0.5),
        ("3", 3),
        ("1_000", 1000),
        ("no", "no"),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("true", True),
        ("1e", "1e"),
        (".inf", float("inf")),
        ("'1e-5'", "1e-5"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    found = read(tmp_path, f"key: {text}")["key"]
    assert (found, type(found)) == (value, type(value))


def test_what_is_dumped_reads_back(tmp_path: Path) -> None:
    tree = {"a": "1e-5", "b": 1e-5, "c": ["010", "null", "", "~/x", None, True], "d": {"e": "ü: #"}}
    assert read(tmp_path, dump_yaml(tree)) == tree


def test_every_key_remembers_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# first\na:\n  b: 1\n\n  c: [2,\n   3]\n")
    marks = load_recipe_file(path)[1]
    lines = {key: int(place.rpartition(":")[2]) for key, place in marks.items()}
    assert lines == {("a",): 2, ("a", "b"): 3, ("a", "c"): 5, ("a", "c", 0): 5, ("a", "c", 1): 6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  lr: 1\n  lr: 2\n", "x.yaml:3 a.lr: given twice, first in line 2"),
        ("a: 1\nb: [1\n", "x.yaml:3: not YAML"),
        ("- a\n", "x.yaml:1: read"),
        ("", "x.yaml:1: read null"),
        ("a: !!python/object:os.system x\n", "x.yaml:1: not YAML"),
        ("a: *b\n", "x.yaml:1: not YAML"),
    ],
)
def test_a_broken_file_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        read(tmp_path, text)
    assert message in str(raised.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.yaml: cannot read the recipe: No such file"):
        load_recipe_file(tmp_path / "nothing.yaml")


def test_overrides_set_values_and_places_and_leave_the_original_alone() -> None:
    tree = {"a": {"b": 1, "c": [1]}, "empty": None}
    marks = {("a",): "x:1", ("a", "b"): "x:2", ("a", "c"): "x:3", ("a", "c", 0): "x:3", ("empty",): "x:4"}
    changed, places = apply_overrides(
        tree, marks, ["a.b=1e-5", "a.c=[x, y]", "new.deep=true", "a.b=2", "empty.x=1"]
    )
    assert changed == {"a": {"b": 2, "c": ["x", "y"]}, "new": {"deep": True}, "empty": {"x": 1}}
    assert tree == {"a": {"b": 1, "c": [1]}, "empty": None}
    assert places == {
        ("a",): "x:1",
        ("a", "b"): "command line: a.b=2",
        ("a", "c"): "command line: a.c=[x, y]",
        ("new",): "command line: new.deep=true",
        ("new", "deep"): "command line: new.deep=true",
        ("empty",): "x:4",
        ("empty", "x"): "command line: empty.x=1",
    }


@pytest.mark.parametrize("override", ["a.b", "=1", "a..b=1", ".a=1"])
def test_an_override_without_key_and_value_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match="expected key=value"):
        apply_overrides({}, {}, [override])


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"command line: a\.b\.c=1: a\.b is 3 and has no keys"):
        apply_overrides({"a": {"b": 3}}, {}, ["a.b.c=1"])
