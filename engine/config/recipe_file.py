"""Recipe files as trees: YAML in and out, file and line of every key, overrides."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from paralign.models.errors import RecipeError

from .decoding import Key, Marks, dotted, shown


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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: cannot read the recipe: {reason}") from None
    marks: Marks = {}
    tree = _read_yaml(text, str(path), marks)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}:1: read {shown(tree)}; expected keys and values")
    return tree, marks


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """The text that `load_recipe_file` reads back as the same tree."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _read_yaml(text: str, place: str, marks: Marks | None = None) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, (), place, {} if marks is None else marks)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and marks is not None else ""
        raise RecipeError(f"{place}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{place}: not YAML: {error}") from None
    finally:
        loader.dispose()


def _plain(loader: _Loader, node: yaml.Node, key: Key, place: str, marks: Marks) -> Any:
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in mapping:
                first = marks[(*key, name)].rpartition(":")[2]
                raise RecipeError(
                    f"{place}:{line} {dotted((*key, name))}: given twice, first in line {first}; delete one"
                )
            marks[(*key, name)] = f"{place}:{line}"
            mapping[name] = _plain(loader, value_node, (*key, name), place, marks)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            marks[(*key, i)] = f"{place}:{item.start_mark.line + 1}"
        return [_plain(loader, item, (*key, i), place, marks) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


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
        place = f"command line: {override}"
        if not equals or not all(name.split(".")):
            raise RecipeError(f"{place}: expected key=value, such as optimizer.lr=1e-5")
        parts = name.split(".")
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
