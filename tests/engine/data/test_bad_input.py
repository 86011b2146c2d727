"""Wrong files: one error that names the line, or a record that is left out and counted, as the recipe says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from paralign.engine.data.cache import TokenCache, build_or_open
from paralign.engine.data.config import DataConfig
from paralign.models.errors import DataError

from .conftest import chat

Make = Callable[..., DataConfig]

GOOD = chat("hello", "fine, thank you.")


def line(record: object) -> bytes:
    return json.dumps(record).encode() + b"\n"


def messages(*turns: tuple[str, object]) -> bytes:
    return line({"messages": [{"role": role, "content": content} for role, content in turns]})


CALLS = line(
    {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
        ]
    }
)

# Each stands as the second line of a file whose other records are good.
BAD_RECORDS: dict[str, tuple[bytes, str]] = {
    "another format": (
        line({"instruction": "a", "output": "b"}),
        "read a record of format alpaca in a file of",
    ),
    "no role": (line({"messages": [{"content": "a"}]}), "no role; expected role and content"),
    "two system turns": (
        messages(("system", "a"), ("system", "b"), ("user", "c")),
        "turn 1 is of the system again",
    ),
    "an assistant turn first": (messages(("assistant", "a"), ("user", "b")), "expected the user to begin"),
    "null content": (messages(("user", "a"), ("assistant", None)), ".content: read null; expected text"),
    "tool calls without tools": (CALLS, "calls the tool add, and the record has no tools"),
    "invalid UTF-8": (b'{"messages": "\xff"}\n', "byte 0xff is not UTF-8"),
    "broken JSON": (b'{"messages": \n', "Expecting value at column"),
    "not an object": (b"3\n", "read 3; expected an object with messages"),
    "no turns": (line({"messages": []}), "expected a list of at least one message"),
}


def build(config: DataConfig, tokenizer_dir: Path) -> TokenCache:
    return build_or_open(config, config.train, tokenizer_dir, progress=False)


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_an_error_with_its_line_or_left_out_and_counted(
    name: str, tokenizer_dir: Path, data_config: Make, tmp_path: Path
):
    content, message = BAD_RECORDS[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(GOOD) + content + line(GOOD))
    with pytest.raises(DataError) as caught:
        build(data_config(path), tokenizer_dir)
    assert str(caught.value).startswith(f"{path}:2")
    assert message in str(caught.value)

    cache = build(data_config(path, bad_record="skip"), tokenizer_dir)
    assert (len(cache), cache.n_bad) == (2, (1,))
    assert cache.first_bad == str(caught.value)
    assert cache.place(1) == f"{path}:3"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]"])
@pytest.mark.parametrize("bad_record", ["error", "skip"])
def test_an_empty_file_is_an_error(
    content: bytes, bad_record: str, tokenizer_dir: Path, data_config: Make, tmp_path: Path
):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl: no record"):
        build(data_config(tmp_path / "a.jsonl", bad_record=bad_record), tokenizer_dir)


@pytest.mark.parametrize("content", [line(GOOD), b"[" + line(GOOD) + b"]"], ids=["JSONL", "list"])
def test_a_byte_order_mark_is_no_part_of_the_text(
    content: bytes, tokenizer_dir: Path, data_config: Make, tmp_path: Path
):
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + content)
    plain, marked = (build(data_config(tmp_path / name), tokenizer_dir) for name in ("a.json", "b.json"))
    assert plain.tokens.tolist() == marked.tokens.tolist()


def test_a_file_of_bad_records_alone_is_an_error_even_where_they_are_skipped(
    tokenizer_dir: Path, data_config: Make, tmp_path: Path
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(messages(("assistant", "a")) * 3)
    with pytest.raises(DataError, match=r"no sample is left: 3 that cannot be read, the first: .*:1: turn 0"):
        build(data_config(path, format="messages", bad_record="skip"), tokenizer_dir)


def test_a_parquet_file_without_the_column_is_an_error_before_any_row(
    tokenizer_dir: Path, data_config: Make, tmp_path: Path
):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"question": "a", "answer": "b"}] * 3), path)
    for keys in ({"format": "prompt_completion"}, {"format": "prompt_completion", "bad_record": "skip"}):
        with pytest.raises(DataError, match=r"a.parquet: no column prompt, .*the table has question, answer"):
            build(data_config(path, **keys), tokenizer_dir)
    with pytest.raises(
        DataError, match=r"a.parquet:1: read the keys question, answer; expected .*see `columns`"
    ):
        build(data_config(path), tokenizer_dir)
    source = {"path": path, "columns": {"prompt": "question", "completion": "answer"}}
    assert len(build(data_config(path, train=source), tokenizer_dir)) == 3


def test_a_source_without_samples_is_an_error_unless_its_weight_is_0(
    tokenizer_dir: Path, data_config: Make, tmp_path: Path
):
    (tmp_path / "good.jsonl").write_bytes(line(GOOD))
    (tmp_path / "long.jsonl").write_bytes(line(chat("a", "b" * 200)) * 2)
    sources = [{"path": tmp_path / "good.jsonl"}, {"path": tmp_path / "long.jsonl", "weight": 1}]
    with pytest.raises(
        DataError, match=r"long.jsonl: no sample is left: 2 longer than 64 tokens, 0 with nothing"
    ):
        build(data_config(Path(), train=sources, too_long="drop"), tokenizer_dir)
    sources[1]["weight"] = 0
    assert len(build(data_config(Path(), train=sources, too_long="drop"), tokenizer_dir)) == 1


def test_a_validation_set_without_samples_is_an_error(tokenizer_dir: Path, data_config: Make, tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(line(chat("a question alone")))
    config = data_config(
        tmp_path / "a.jsonl", validation={"code": tmp_path / "a.jsonl"}, nothing_to_learn="skip"
    )
    with pytest.raises(
        DataError, match=r"no sample is left: 0 longer than 64 tokens, 1 with nothing to learn"
    ):
        build_or_open(config, config.sets["validation/code"], tokenizer_dir, progress=False)
