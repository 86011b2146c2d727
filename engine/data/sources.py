"""Sources of samples, read record by record: JSON, JSONL and tables, with line numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from paralign.models.errors import DataError

from ..batch import Kind
from .config import SourceConfig
from .conversation import REQUIRED, RecordFormat, detect_format, rename
from .hashed_file import Digests, in_order
from .json_value import json_value
from .tables import Record, is_table, table_files, table_records
from .turns import cut

Reading = RecordFormat | Kind
_SPACE = " \t\r\n"
LONGEST = 1 << 26  # bytes of a record; a book has a hundredth


def read_records(path: Path, digests: Digests | None = None) -> Iterator[Record]:
    """The records of a source, in order.

    A JSON list or a JSONL file (told apart by the first character): UTF-8, with or without a byte order mark.
    JSONL is read line by line, empty lines are passed over; the text of a list is held whole, its records one
    at a time. A Parquet file or the folder of a saved data set: row by row.

    Args:
        digests: what the files must hold, compared with what was read at the end of each.

    Raises:
        DataError: no such file, a broken list or table, no record; other bytes than `digests` says. A broken line is
            found by `decode`.
    """
    if is_table(path):
        records = table_records(path, digests)
    elif path.is_file():
        records = (_list_records if _opens_a_list(path) else _line_records)(path, digests)
    else:
        raise DataError(f"{path}: no such file")
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(
            f"{path}: no record; expected a JSON list, one JSON object per line, or rows of a table"
        )


def content_files(path: Path) -> list[Path]:
    """The files that hold a source's content: the file itself, or those of a saved data set."""
    if path.is_dir():
        return table_files(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return [path]


def decode(record: Record, path: Path) -> object:
    """The value of a record; DataError with file, line and column if it is no JSON or not UTF-8."""
    content = record.content
    if isinstance(content, dict):
        return content
    if len(content) > LONGEST:
        raise DataError(
            f"{path}:{record.line}: a record of {len(content):,} bytes or more; expected at most {LONGEST:,}; "
            "split it, or write one record per line"
        )
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, record.line, error) from None
    try:
        return json_value(text)
    except json.JSONDecodeError as error:
        raise _broken(path, record.line + error.lineno - 1, error, "one JSON object per line") from None
    except ValueError as error:
        raise DataError(f"{path}:{record.line}: {error}; mend the record") from None


def record_format(source: SourceConfig, kind: Kind = Kind.CONVERSATIONS) -> Reading:
    """The stated format of a source's conversations, or that of its first record if it is `auto`.

    The keys of other kinds of records say what they are: for these it is the kind.

    Raises:
        DataError: the first record is of no format; a table has not the columns of the stated format.
    """
    if kind is not Kind.CONVERSATIONS:
        return kind
    path = source.path
    if source.format in (None, "auto"):
        first = next(read_records(path))
        return detect_format(rename(decode(first, path), source.columns), f"{path}:{first.line}")
    stated: RecordFormat = source.format  # type: ignore[assignment]
    if is_table(path):
        row = next(read_records(path)).content
        assert isinstance(row, dict)
        for key in REQUIRED[stated]:
            if (column := source.columns.get(key, key)) not in row:
                raise DataError(
                    f"{path}: no column {column}, which format {stated} needs; the table has {', '.join(row)}; "
                    f"name it by columns: {{{key}: …}}"
                )
    return stated


def _opens_a_list(path: Path) -> bool:
    with path.open("rb") as file:
        while part := file.readline(LONGEST):
            text = part.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                return text.startswith(b"[")
    return False


def _line_records(path: Path, digests: Digests | None) -> Iterator[Record]:
    with in_order(path, digests) as file:  # in bytes: text mode would also split at other line separators
        line = 0
        while raw := file.readline(LONGEST + 2):
            line += 1
            n_bytes, part = len(raw), raw
            while len(part) == LONGEST + 2 and not part.endswith(b"\n"):  # the rest is passed over
                part = file.readline(LONGEST + 2)
                n_bytes += len(part)
            content = (raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw).strip()
            if content:
                yield Record(line, content, n_bytes)


def _list_records(path: Path, digests: Digests | None) -> Iterator[Record]:
    with in_order(path, digests) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, raw.count(b"\n", 0, error.start) + 1, error) from None
    bytes_per_char = len(raw) / len(text)
    del raw
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    at = _skip(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        try:
            line, counted = line + text.count("\n", counted, at), at
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken_list(path, error) from None
        except (ValueError, RecursionError) as error:
            found = (
                "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
            )
            raise DataError(f"{path}:{line}: {found}; mend the record") from None
        yield Record(line, text[at:end], round((end - at) * bytes_per_char))
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
    near = cut(error.doc[start : error.pos + 30].replace("\n", "⏎"))
    found = f"{error.msg} at column {error.colno}, near `{near}`"
    return DataError(f"{path}:{line}: {found}; expected {expected}")


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{path}:{line}: byte {byte:#04x} is not UTF-8; expected UTF-8; convert the file")
