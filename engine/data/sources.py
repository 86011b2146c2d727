"""Files of samples, read record by record. Owns JSON, JSONL and line numbers, not what records mean."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paralign.models.errors import DataError

from .config import Format
from .conversation import RecordFormat, detect_format

_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Record:
    """The text of one JSON record, not yet decoded, and the line it begins at, from 1."""

    line: int
    text: str


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSON list or a JSONL file (told apart by the first character), in order.

    UTF-8, with or without a byte order mark. JSONL is read line by line, empty lines are passed over; the
    text of a list is held whole, its records one at a time.

    Raises:
        DataError: no such file, not UTF-8, a broken list, no record. A broken line is found by `decode`.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    records = _list_records(path) if _opens_a_list(path) else _line_records(path)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(f"{path}: no record; expected a JSON list or one JSON object per line")


def decode(record: Record, path: Path) -> object:
    """The JSON value of a record; DataError with file, line and column if it is none."""
    try:
        return json.loads(record.text)
    except json.JSONDecodeError as error:
        raise _broken(path, record.line + error.lineno - 1, error, "one JSON object per line") from None


def record_format(path: Path, stated: Format) -> RecordFormat:
    """`stated`, or the format of the file's first record if it is `auto`."""
    if stated != "auto":
        return stated
    first = next(read_records(path))
    return detect_format(decode(first, path), f"{path}:{first.line}")


def _opens_a_list(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                return text.startswith(b"[")
    return False


def _line_records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:  # in bytes: text mode would also split at other line separators
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, line, error) from None
            if text:
                yield Record(line, text)


def _list_records(path: Path) -> Iterator[Record]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, raw.count(b"\n", 0, error.start) + 1, error) from None
    del raw
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    at = _skip(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken_list(path, error) from None
        line, counted = line + text.count("\n", counted, at), at
        yield Record(line, text[at:end])
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise _broken_list(path, json.JSONDecodeError("Expecting ',' or ']'", text, at))
    rest = _skip(text, at + 1)
    if rest < len(text):
        raise _broken_list(path, json.JSONDecodeError("Extra data after the list", text, rest))


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _broken_list(path: Path, error: json.JSONDecodeError) -> DataError:
    return _broken(path, error.lineno, error, "a JSON list")


def _broken(path: Path, line: int, error: json.JSONDecodeError, expected: str) -> DataError:
    start = max(0, error.pos - 30)
    near = error.doc[start : error.pos + 30].replace("\n", "⏎")
    found = f"{error.msg} at column {error.colno}, near `{near}`"
    return DataError(f"{path}:{line}: {found}; expected {expected}")


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{path}:{line}: byte {byte:#04x} is not UTF-8; expected UTF-8; convert the file")
