"""Checksums of a directory's files: whatever is not as it was written is found, in any block."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from paralign.engine.files import checksums
from paralign.engine.files.checksums import broken_file, has_checksums, write_checksums
from paralign.engine.files.number_file import NumberFile
from paralign.models.errors import DataError


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checksums, "BLOCK", 100)
    for name, size in (("a.bin", 1234), ("b.bin", 100), ("empty.bin", 0)):
        (tmp_path / name).write_bytes(bytes(i % 251 for i in range(size)))
    assert not has_checksums(tmp_path)
    write_checksums(tmp_path, ["a.bin", "b.bin", "empty.bin"])
    return tmp_path


def test_a_digest_is_that_of_the_digests_of_blocks(directory: Path) -> None:
    assert has_checksums(directory)
    assert broken_file(directory) is None
    content = (directory / "a.bin").read_bytes()
    blocks = [hashlib.sha256(content[i : i + 100]).digest() for i in range(0, len(content), 100)]
    noted = json.loads((directory / "checksums.json").read_text())
    assert noted["block"] == 100
    assert noted["files"]["a.bin"] == [1234, hashlib.sha256(b"".join(blocks)).hexdigest()]


@pytest.mark.parametrize("at", [0, 99, 100, 1200, 1233])
def test_a_bit_is_found_wherever_it_is(directory: Path, at: int) -> None:
    content = bytearray((directory / "a.bin").read_bytes())
    content[at] ^= 128
    (directory / "a.bin").write_bytes(content)
    assert broken_file(directory) == "a.bin holds other bytes than were written"


def test_a_file_that_is_cut_or_away_and_checksums_that_are_none_are_found(directory: Path) -> None:
    os.truncate(directory / "b.bin", 99)
    assert broken_file(directory) == "b.bin has 99 bytes where 100 were written"
    (directory / "b.bin").unlink()
    assert "cannot be checked" in (broken_file(directory) or "")
    for text in (
        "",
        "[]",
        "{}",
        '{"block": 0, "files": {"a.bin": [1234, ""]}}',
        '{"block": 1, "files": 3}',
        "\0",
    ):
        (directory / "checksums.json").write_text(text)
        assert "cannot be checked" in (broken_file(directory) or "")


def test_numbers_are_read_stretch_by_stretch(tmp_path: Path) -> None:
    path = tmp_path / "numbers.bin"
    numbers = np.arange(10, dtype=np.int32)
    numbers.tofile(path)
    found = NumberFile(path, np.int32)
    assert len(found) == 10
    for stretch in (slice(None), slice(2, 5), slice(3, 3), slice(7, 99), slice(-2, None)):
        assert np.array_equal(found[stretch], numbers[stretch])
    assert found.at(np.array([9, 0, 3])).tolist() == [9, 0, 3]
    os.truncate(path, 20)
    assert found[:5].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(
        DataError, match=r"numbers\.bin: was cut to 20 of 40 bytes since it was opened; start again"
    ):
        found[3:7]
    path.write_bytes(b"12345")
    with pytest.raises(ValueError, match="no whole number of int32"):
        NumberFile(path, np.int32)
