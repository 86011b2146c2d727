"""Recipe files as trees: YAML in and out, file and line of every key, overrides."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from paralign.models.errors import RecipeError

from .decoding import Key, Marks, dotted, shortened, shown

# Far above any recipe, and low enough that the worst text of this size is read in seconds.
MAX_BYTES = 2**18
MAX_VALUES = 10_000  # with every alias written out: a few lines of them can stand for billions
MAX_DEPTH = 40
MAX_DIGITS = 4_000  # Python reads no longer integer


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars. PyYAML's own, 1.1, read 1e-5 as text, `no` as false and 010 as eight."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str")
    }


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would not read back as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


for _tag, _pattern, _first in (
    ("null", r"|~|null", ["", "~", "n"]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.inf|\.nan", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)


def load_recipe_file(path: Path) -> tuple[dict[str, Any], Marks]:
    """Reads a YAML mapping and the line of each of its keys. Raises RecipeError with file and line."""
    text = _read_text(path)
    marks: Marks = {}
    tree = _read_yaml(text, str(path), marks)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}:1: read {shown(tree)}; expected keys and values")
    return tree, marks


def _read_text(path: Path) -> str:
    try:
        if not path.is_file() and path.exists():
            raise RecipeError(f"{path}: cannot read the recipe: not a regular file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(f"{path}: longer than {MAX_BYTES:,} bytes; is this a recipe?")
        return content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{shortened(str(path))}: cannot read the recipe: {reason}") from None


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """The text that `load_recipe_file` reads back as the same tree."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _read_yaml(text: str, place: str, marks: Marks | None = None) -> Any:
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow; its message has several lines
        raise RecipeError(f"{place}: not YAML: {' '.join(str(error).split())}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        return _Tree(loader, place, {} if marks is None else marks, lines=marks is not None).plain(node, ())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and marks is not None else ""
        raise RecipeError(f"{place}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{place}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{place}: nested too deeply; a recipe has a few levels") from None
    finally:
        loader.dispose()


class _Tree:
    """Makes plain values of YAML's nodes, aliases written out, and notes the line of each key.

    Args:
        place: of the text, as errors name it.
        marks: filled with the place of each key.
        lines: whether the text has lines that errors can name.
    """

    def __init__(self, loader: _Loader, place: str, marks: Marks, *, lines: bool) -> None:
        self._loader, self._place, self._marks, self._lines = loader, place, marks, lines
        self._values = 0

    def plain(self, node: yaml.Node, key: Key) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise RecipeError(
                f"{self._at(node)}: more than {MAX_VALUES:,} values, with its aliases written out"
            )
        if len(key) > MAX_DEPTH:  # an alias inside its own anchor never ends
            raise RecipeError(f"{self._at(node)}: nested deeper than {MAX_DEPTH} levels; a recipe has a few")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._marks[(*key, i)] = self._at(item)
            return [self.plain(item, (*key, i)) for i, item in enumerate(node.value)]
        if len(node.value) > MAX_DIGITS and node.tag == "tag:yaml.org,2002:int":
            raise RecipeError(f"{self._at(node)} {dotted(key)}: an integer of {len(node.value):,} digits")
        try:
            return self._loader.construct_object(node)
        except (ValueError, KeyError, IndexError, OverflowError):  # as of `!!int x`: PyYAML does not look
            kind = node.tag.rpartition(":")[2]
            raise RecipeError(
                f"{self._at(node)} {dotted(key)}: read {shown(node.value)}; expected {kind}, as its tag says"
            ) from None

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{self._at(key_node)}: a key that is a list or a mapping; expected a name")
            name = str(key_node.value)
            if name in mapping:
                first = self._marks[(*key, name)].rpartition(":")[2]
                raise RecipeError(
                    f"{self._at(key_node)} {dotted((*key, name))}: given twice, first in line {first}; delete one"
                )
            self._marks[(*key, name)] = self._at(key_node)
            mapping[name] = self.plain(value_node, (*key, name))
        return mapping

    def _at(self, node: yaml.Node) -> str:
        return f"{self._place}:{node.start_mark.line + 1}" if self._lines else self._place


def apply_overrides(
    tree: Mapping[str, Any], marks: Marks, overrides: Sequence[str]
) -> tuple[dict[str, Any], Marks]:
    """Sets dotted keys, as in `optimizer.lr=1e-5`; values are YAML, a later override wins.

    Returns new trees; the arguments stay as they are.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(tree))
    marks = dict(marks)
    for override in overrides:
        name, equals, text = override.partition("=")
        place = f"command line: {shortened(override)}"
        if not equals or not all(name.split(".")):
            raise RecipeError(f"{place}: expected key=value, such as optimizer.lr=1e-5")
        parts = name.split(".")
        if len(parts) > MAX_DEPTH:
            raise RecipeError(f"{place}: a key of {len(parts)} parts; a recipe has a few levels")
        section = changed
        for depth, part in enumerate(parts[:-1], start=1):
            if section.get(part) is None:  # absent, or a section that was left empty
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise RecipeError(f"{place}: {'.'.join(parts[:depth])} is {shown(section)} and has no keys")
        section[parts[-1]] = _read_yaml(text, place)
        key = tuple(parts)
        marks = {known: mark for known, mark in marks.items() if known[: len(key)] != key}
        for depth in range(1, len(key) + 1):
            marks.setdefault(key[:depth], place)
    return changed, marks
