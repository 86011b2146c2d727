"""Lines of a run: cut where a run goes on, and nothing is lost of what is torn or strange."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from paralign.engine.files.json_lines import StepLines, read_lines

STRANGE = [
    b'{"step": 1, "lo',
    b"\0\0\0\0",
    b"[1, 2]",
    b"5",
    b"null",
    b'"text"',
    b"{}",
    b'{"step": "1"}',
    b'{"step": true}',
    b'{"step": 1.5}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"step": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("strange", STRANGE, ids=lambda text: repr(text[:16]))
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_strange_line_is_set_aside_and_no_good_one_is_lost(tmp_path: Path, strange: bytes, at: int) -> None:
    path = tmp_path / "x.jsonl"
    good = [b'{"step": 0, "a": 1.50}', b'{"step":1}', b'{"step": 2, "b": "\xc3\xbc"}']
    lines = [*good[:at], strange, *good[at:]]
    path.write_bytes(b"\n".join(lines))  # without an end, as a kill leaves it
    opened = StepLines(path, 2)
    assert opened.unread == [at + 1]
    opened.write({"step": 2, "c": None})
    opened.close()
    assert path.read_bytes() == b'{"step": 0, "a": 1.50}\n{"step":1}\n{"step": 2, "c": null}\n'
    assert (tmp_path / "x.jsonl.unread").read_bytes() == strange + b"\n"


def test_cut_at_any_byte_it_opens_and_keeps_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    whole = b"".join(json.dumps({"step": i, "loss": i / 3}).encode() + b"\n" for i in range(5))
    for length in random.Random(2).sample(range(len(whole)), 40):
        path.write_bytes(whole[:length])
        StepLines(path, 9).close()
        steps = [line.values["step"] for line in read_lines(path) if line.values]
        assert steps == list(range(whole[: length + 1].count(b"\n")))
