"""Every key of a recipe in tables, from the sections' own docstrings: the second part of docs/recipes.md.

python -m paralign.tools.recipe_reference
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from paralign.engine.config.decoding import Section, meaning
from paralign.engine.run.recipe import Recipe


def reference() -> str:
    """Markdown: a table of keys for each section, in the order of a recipe."""
    return "\n".join(_lines(Recipe, "", set()))


def _lines(section: type[Section], place: str, told: set[type[Section]]) -> Iterator[str]:
    told.add(section)
    inner: list[tuple[type[Section], str]] = []
    rows = []
    for name, field in section.model_fields.items():
        key = field.alias or name
        found = list(_sections(field.annotation))
        for child in found:
            label = f"{place}{key}"
            if len(found) > 1:  # an objective: told apart by its name
                label += f": {get_args(child.model_fields['name'].annotation)[0]}"
            inner.append((child, label))
        described = meaning(section, key)
        if found:
            described = _linked(described, [label for _, label in inner[-len(found) :]])
        default = "" if "Default: " in described else _default(field)
        rows.append(f"| `{key}` | {default} | {_text(described, field)} |")
    if place:
        yield f"### `{place.rstrip('.')}`\n"
    first = (section.__doc__ or "").split("\n")[0]
    yield f"{first}\n"
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    yield from rows
    yield ""
    for child, label in inner:
        if child not in told:  # a source is the same in train and validation
            yield from _lines(child, f"{label}.", told)


def _linked(described: str, headings: list[str]) -> str:
    """What is said of a section, with a link to the heading of its table, or to those of all that may stand there."""
    anchors = [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings]
    if len(headings) == 1:
        return re.sub(r"the (\w+ )?section", rf"[\g<0>](#{anchors[0]})", described, count=1)
    names = [heading.split(": ")[-1] for heading in headings]
    return f"{described}: {', '.join(f'[{name}](#{anchor})' for name, anchor in zip(names, anchors))}"


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _sections(part)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _text(described: str, field: FieldInfo) -> str:
    text = described.removeprefix(": ")
    choices = _choices(field.annotation)
    unsaid = [choice for choice in choices if choice not in text]
    if len(choices) > 1 and unsaid:
        text += f"; {', '.join(f'`{choice}`' for choice in choices)}"
    return text.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "see below"
    return f"`{json.dumps(str(value) if isinstance(value, Path) else value)}`"


if __name__ == "__main__":
    print(reference())
