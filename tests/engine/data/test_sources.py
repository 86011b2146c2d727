import json
from pathlib import Path

import pytest

from paralign.engine.data.config import SourceConfig
from paralign.engine.data.sources import decode, read_records, record_format
from paralign.models.errors import DataError

RECORDS = [{"messages": i, "text": "é\u2028]}"} for i in range(3)]


def read(path: Path) -> list[tuple[int, object]]:
    return [(record.line, decode(record, path)) for record in read_records(path)]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_jsonl_lines_are_counted_through_empty_ones(tmp_path: Path, bom: bytes):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in RECORDS]
    path.write_bytes(bom + lines[0] + b"\r\n\n" + lines[1] + b"\n" + lines[2])
    assert read(path) == [(1, RECORDS[0]), (3, RECORDS[1]), (4, RECORDS[2])]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_list_gives_the_line_each_record_begins_at(tmp_path: Path, bom: bytes):
    path = tmp_path / "a.json"
    path.write_bytes(bom + b"\n" + json.dumps(RECORDS, ensure_ascii=False, indent=1).encode())
    assert read(path) == [(3, RECORDS[0]), (7, RECORDS[1]), (11, RECORDS[2])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2\n', ":2: Expecting ',' delimiter at column 8"),
        (b"\nhello\n", ":2: Expecting value at column 1, near `hello`; expected one JSON object per line"),
        (b'[{"a": 1},\n {"a" 2}]', ":2: Expecting ':' delimiter at column 7"),
        (b'[{"a": 1}\n {"a": 2}]', ":2: Expecting ',' or ']' at column 2"),
        (b'[{"a": 1},\n {"a": 2}', ":2: Expecting ',' or ']'"),
        (b"[1]\n[2]", ":2: Extra data after the list at column 1"),
        (b'{"a": 1}\n{"a": "\xff"}', ":2: byte 0xff is not UTF-8"),
        (b'[1,\n\n"\xff"]', ":3: byte 0xff is not UTF-8"),
        (b" \n", ": no record; expected a JSON list, one JSON object per line, or rows of a table"),
        (b"[ ]", ": no record"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent.jsonl: no such file"):
        read(tmp_path / "absent.jsonl")


def test_the_format_is_that_of_the_first_record_unless_stated(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')
    assert record_format(SourceConfig(path=path)) == "alpaca"
    assert record_format(SourceConfig(path=path, format="messages")) == "messages"
    renamed = SourceConfig(path=path, columns={"prompt": "instruction", "completion": "output"})
    assert record_format(renamed) == "prompt_completion"
