"""Strict decoding of a recipe: a tree to typed sections, every error with its place. Opens no file."""

from __future__ import annotations

import difflib
import errno
import inspect
import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from paralign.models.errors import RecipeError

Key = tuple[str | int, ...]
"""Where a value stands in the tree: `("data", "train", 0)` is written `data.train[0]`."""
Marks = dict[Key, str]
"""The place of each key, as errors name it: `sft/x.yaml:14`, or `command line: optimizer.lr=1e-5`."""
SectionT = TypeVar("SectionT", bound="Section")
MAX_PROBLEMS = 20  # told at once
_NO_TEXT = "NUL and half characters are no text"
_INTEGERS = range(-(2**63), 2**63)  # what torch and NumPy take


class Section(BaseModel):
    """One part's share of a recipe. Unknown keys are errors; a section never changes after decoding.

    The `Attributes:` of its docstring say what each key means: an error quotes them where a key is missing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def decode(model: type[SectionT], tree: Mapping[str, Any], marks: Marks, path: Path) -> SectionT:
    """Turns a tree into a section, with `~` and `${VARIABLE}` expanded in every text.

    Raises one RecipeError with a line for each problem.
    """
    problems: list[str] = []
    expanded = _expand(tree, (), marks, str(path), problems)
    if not problems:
        try:
            section = model.model_validate(expanded)
        except ValidationError as error:
            problems = _describe(error.errors(include_url=False), model, expanded, marks, str(path))
        else:
            if not (problems := [_line(key, marks, str(path), what) for key, what in _bad_paths(section)]):
                return section
    raise RecipeError(some_of(problems))


def some_of(problems: Sequence[str]) -> str:
    """A line for each, as far as one can read them."""
    more = len(problems) - MAX_PROBLEMS
    return "\n".join([*problems[:MAX_PROBLEMS], *([f"and {more:,} more like these"] if more > 0 else [])])


def _bad_paths(value: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """Paths that no file can have, and those of devices and pipes, which may have no end."""
    if isinstance(value, Section):
        for name, field in type(value).model_fields.items():
            yield from _bad_paths(getattr(value, name), (*key, field.alias or name))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _bad_paths(item, (*key, name))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _bad_paths(item, (*key, i))
    elif isinstance(value, Path):
        try:
            kind = value.stat().st_mode
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                yield key, f"read {shown(str(value))}: {error.strerror}; give another path"
        else:
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                yield key, f"read {shown(str(value))}; expected a file or a directory, no device or pipe"


def _expand(value: Any, key: Key, marks: Marks, path: str, problems: list[str]) -> Any:
    if isinstance(value, dict):
        for name in value:
            if not _is_text(name):
                problems.append(_line(key, marks, path, f"key {shown(name)}: {_NO_TEXT}"))
        return {name: _expand(item, (*key, name), marks, path, problems) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, (*key, i), marks, path, problems) for i, item in enumerate(value)]
    if isinstance(value, int) and value not in _INTEGERS:
        problems.append(
            _line(key, marks, path, f"read {shown(value)}; expected an integer of at most 64 bits")
        )
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{(\w+)\}", value):
        if name not in os.environ:
            problems.append(_line(key, marks, path, f"the environment variable {name} is not set; export it"))
    text = re.sub(r"\$\{(\w+)\}", lambda name: os.environ.get(name[1], ""), value)
    if not _is_text(text):
        problems.append(_line(key, marks, path, f"read {shown(text)}; {_NO_TEXT}"))
        return ""
    return os.path.expanduser(text)


def _is_text(text: str) -> bool:
    """Whether a file can have it as a name, and a terminal can show it."""
    return "\0" not in text and (text.isascii() or not re.search("[\ud800-\udfff]", text))


def _describe(
    errors: Sequence[ErrorDetails], model: type[Section], tree: Any, marks: Marks, path: str
) -> list[str]:
    """One line for each faulty key, in pydantic's order."""
    said: dict[Key, str] = {}
    expected: dict[Key, list[str]] = defaultdict(list)  # a union reports a key once for each of its members
    for error in errors:
        kind, tagged = error["type"], error["loc"]
        key = _without_tags(model, tagged)
        if kind == "missing":
            said[key] = f"missing{meaning(_section_at(model, tagged[:-1]), str(key[-1]))}"
        elif kind == "extra_forbidden":
            said[key] = f"unknown key{_suggest_key(model, tagged)}"
        elif kind == "union_tag_invalid":
            said[(*key, "name")] = _wrong_name(error)
        elif kind == "value_error":  # from a section's own validator, which says it all
            said[_existing(tree, key)] = str(error["ctx"]["error"])
        else:
            key = _existing(tree, key)
            expected[key].append(_expected(error))
            rule = " or ".join(dict.fromkeys(expected[key]))
            said[key] = f"read {shown(_value_at(tree, key))}; expected {rule}"
    return [_line(key, marks, path, message) for key, message in said.items()]


def _line(key: Key, marks: Marks, path: str, message: str) -> str:
    place = next((marks[key[:n]] for n in range(len(key), 0, -1) if key[:n] in marks), path)
    name = dotted(key)
    if not name or place.startswith(f"command line: {name}="):  # an override names its own key
        return f"{place}: {message}"
    return f"{place} {name}: {message}"


def _expected(error: ErrorDetails) -> str:
    kind, limits = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", limits["expected"])
        near = difflib.get_close_matches(str(error["input"]), choices, n=1)
        return _listed(choices) + (f"; did you mean {near[0]}?" if near else "")
    for prefix, meaning in (
        ("int", "an integer"),
        ("float", "a number"),
        ("finite", "a finite number"),
        ("bool", "true or false"),
        ("string_pattern", f"text that matches {limits.get('pattern')}"),
        ("string", "text"),
        ("path", "a path"),
        ("tuple", "a list"),
        ("list", "a list"),
        ("dict", "names and values"),
        ("model", "a section of keys and values"),
        ("none", "null"),
        ("greater_than_equal", f"at least {limits.get('ge')}"),
        ("greater_than", f"more than {limits.get('gt')}"),
        ("less_than_equal", f"at most {limits.get('le')}"),
        ("less_than", f"less than {limits.get('lt')}"),
        ("too_short", f"at least {limits.get('min_length')} entries"),
    ):
        if kind.startswith(prefix):
            return meaning
    return error["msg"]


def _suggest_key(model: type[Section], key: Key) -> str:
    name, section = str(key[-1]), _section_at(model, key[:-1])
    fields = section.model_fields.items() if section else []
    siblings = [field.alias or known for known, field in fields]
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean {near[0]}?"
    elsewhere = [known for known in _keys(model) if known.rpartition(".")[2] == name]
    if elsewhere:
        return f" here; did you mean {_listed(elsewhere)}?"
    return f"; the keys here are {', '.join(siblings)}"


def meaning(section: type[Section] | None, name: str) -> str:
    """What the section's docstring says of a key, behind `: `; nothing where it says nothing."""
    for owner in section.__mro__ if section else ():
        documented = inspect.cleandoc(owner.__doc__ or "")
        found = re.search(rf"^ {{4}}{name}: (.+?)(?=\n {{0,4}}\S|\Z)", documented, re.MULTILINE | re.DOTALL)
        if found:
            return f": {' '.join(found[1].split()).rstrip('.')}"
    return ""


def _keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if _is_section(field.annotation):
            yield from _keys(cast(type[Section], field.annotation), f"{prefix}{name}.")


def _section_at(model: type[Section], key: Key) -> type[Section] | None:
    annotation: Any = model
    for name in key:
        if _is_section(annotation):
            field = annotation.model_fields.get(str(name))
            annotation = None if field is None else field.annotation
        elif named := _named(annotation, name):
            annotation = named
        else:  # an entry of a list, or a value beside its name
            entries = [entry for entry in get_args(annotation) if entry is not Ellipsis]
            annotation = entries[-1] if entries else None
    return annotation if _is_section(annotation) else None


def _named(annotation: Any, name: str | int) -> type[Section] | None:
    """The member of a union of sections that says `name` of itself; pydantic puts that name into its places."""
    for member in get_args(annotation):
        field = member.model_fields.get("name") if _is_section(member) else None
        if field is not None and name in get_args(field.annotation):
            return member
    return None


def _without_tags(model: type[Section], key: Key) -> Key:
    """A place as it stands in the tree, without the names that pydantic adds for members of unions."""
    annotation: Any = model
    place: list[str | int] = []
    for name in key:
        if named := _named(annotation, name):
            annotation = named
            continue
        place.append(name)
        field = annotation.model_fields.get(str(name)) if _is_section(annotation) else None
        annotation = None if field is None else field.annotation
    return tuple(place)


def _wrong_name(error: ErrorDetails) -> str:
    names = re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
    near = difflib.get_close_matches(str(error["ctx"]["tag"]), names, n=1)
    return f"read {shown(error['ctx']['tag'])}; expected {_listed(names)}" + (
        f"; did you mean {near[0]}?" if near else ""
    )


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _existing(tree: Any, key: Key) -> Key:
    """The part of pydantic's location that is in the tree; behind it stand names of union members."""
    for depth, name in enumerate(key):
        inside = name in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(name, int)
        if not inside:
            return key[:depth]
        tree = tree[name]
    return key


def _value_at(tree: Any, key: Key) -> Any:
    for name in key:
        tree = tree[name]
    return tree


def shown(value: Any) -> str:
    """A value as an error quotes it, shortened."""
    if isinstance(value, int) and value not in _INTEGERS:  # Python writes none of over 4,300 digits
        return f"{value:.3e}" if abs(value) < 10**300 else "a huge integer"
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return shortened(text, 60)


def shortened(text: str, length: int = 200) -> str:
    """A text as an error quotes it: no longer than that, and all of it can be printed."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= length else f"{text[: length - 3]}…"


def dotted(key: Key) -> str:
    """A key as it is written: `data.train[0]`."""
    return shortened(_dotted(key))


def _dotted(key: Key) -> str:
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in key).lstrip(".")


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
