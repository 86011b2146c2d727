"""A manifest of files says what is missing, shorter or changed; it never says so of what is as it was."""

import hashlib
import json
import os

import pytest

from paralign.engine.checkpoint.file_manifest import (
    FileDigest,
    broken_files,
    digest_directory,
    digest_file,
    read_file_manifest,
    share_of_files,
    write_file_manifest,
)
from paralign.models.errors import WeightsError


@pytest.fixture
def written(tmp_path):
    (tmp_path / "hf").mkdir()
    for name, content in {"common.pt": b"c" * 9000, "hf/config.json": b"{}", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
    write_file_manifest(tmp_path, digest_directory(tmp_path), step=3)
    return tmp_path


def test_what_was_written_is_found_as_it_was(written):
    read = []
    assert broken_files(written, progress=read.append) == []
    assert sum(read) == 9002
    found = read_file_manifest(written)
    assert list(found) == ["common.pt", "empty", "hf/config.json"]
    assert found["common.pt"] == FileDigest(9000, hashlib.sha256(b"c" * 9000).hexdigest())
    assert found["common.pt"] == digest_file(written / "common.pt")
    content = json.loads((written / "manifest.json").read_text())
    assert (content["format"], content["step"]) == (2, 3)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "common.pt: other content"),
        (lambda path: path.unlink(), "common.pt: missing"),
        (lambda path: path.write_bytes(b"c" * 8999), "common.pt: 8,999 bytes, expected 9,000"),
        (lambda path: path.write_bytes(bytes(9000)), "common.pt: other content"),
        (replace_by_pipe, "common.pt: not a file"),
    ],
)
def test_what_is_broken_is_named(written, damage, words):
    damage(written / "common.pt")
    (written / "notes.txt").write_text("of a person")
    assert broken_files(written) == [words]
    assert broken_files(written, ["common.pt"]) == [words]
    assert broken_files(written, ["hf/config.json", "notes.txt"]) == []


def test_without_a_manifest_nothing_is_known(tmp_path):
    assert read_file_manifest(tmp_path) is None
    assert broken_files(tmp_path) == []
    (tmp_path / "manifest.json").write_text('{"name": "of another program"}')
    assert read_file_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"format": 2}',
        '{"format": 2, "giles": {}}',
        '{"format": 3, "files": {}}',
        '{"format": 2, "files": {"a": {"bytes": 1}}}',
        '{"format": 2, "files": {"a": {"bytes": "1", "sha256": "0"}}}',
        '{"format": 2, "files": {"../a": {"bytes": 1, "sha256": "0"}}}',
        '{"format": 2, "files": {}, "fingerprint": "0", "uensors": {}}',
        '{"format": 2, "files": {}, "gingerprint": "0", "tensors": {"a": {"shape": [], "dtype": "", "sha256": ""}}}',
        b"\xff",
        bytes(100),
    ],
)
def test_a_damaged_manifest_is_a_fault_and_never_none(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (fault,) = broken_files(tmp_path)
    assert fault.startswith("manifest.json: not a manifest (")
    with pytest.raises(WeightsError, match=r"manifest\.json: not a manifest .*copy the directory again"):
        read_file_manifest(tmp_path)


def test_ranks_share_the_work_by_size():
    sizes = [100, 90, 60, 50, 40, 30, 20, 5, 5, 0]
    digests = {f"f{i}": FileDigest(size, "") for i, size in enumerate(sizes)}
    shares = [share_of_files(digests, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(digests)
    loads = [sum(digests[name].bytes for name in share) for share in shares]
    assert max(loads) - min(loads) <= 20
    assert share_of_files(digests, 11, 12) == []
