"""Files of JSON lines that belong to a run, {"step", …} each: read, cut, written a whole line at a time."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .whole_file import write_whole


@dataclass(frozen=True)
class Line:
    """A line of a file, as bytes without its end; `values` is None where it is not one of ours."""

    number: int
    text: bytes
    values: dict[str, Any] | None


def read_lines(path: Path) -> list[Line]:
    """Every line that holds anything; raises OSError."""
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [Line(number, text, _values(text)) for number, text in lines if text.strip()]


def _values(text: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):  # torn by a kill, or written by somebody else
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    return values


class StepLines:
    """A file that grows by a line {"step", …} at a time.

    When it opens, lines of `first_step` and later are cut: a resumed run writes them again. What is no such line, as
    where a kill or a power cut tore one, goes to `NAME.unread` next to it, so that nothing is lost.

    Attributes:
        unread: numbers of those lines.

    Raises:
        OSError: from the opening and from `write`.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_lines(path) if path.exists() else []
        foreign = [line for line in lines if line.values is None]
        self.unread = [line.number for line in foreign]
        if foreign:
            with path.with_name(f"{path.name}.unread").open("ab") as file:
                file.writelines(line.text + b"\n" for line in foreign)
                file.flush()
                os.fsync(file.fileno())
        if lines:
            kept = [line.text for line in lines if line.values and line.values["step"] < first_step]
            write_whole(path, b"".join(text + b"\n" for text in kept))
        self._file = path.open("ab", buffering=0)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line; it is with the system when this returns."""
        rest = memoryview(json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        while rest:
            rest = rest[self._file.write(rest) or 0 :]

    def close(self) -> None:
        self._file.close()
