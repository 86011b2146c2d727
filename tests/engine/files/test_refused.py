"""What a file system refuses: one line with place and remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from paralign.engine.files.refused import check_writable, refusal, refusals_told, told
from paralign.models.errors import RecipeError, TrainingError


def test_a_write_that_names_no_file_gets_the_place() -> None:
    with (
        pytest.raises(TrainingError, match=r"^x/metrics\.jsonl: No space left on device; make room there"),
        refusals_told(Path("x/metrics.jsonl")),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_of_all_errors_only_those_of_a_file_system_are_told() -> None:
    assert isinstance(told(OSError(errno.EDQUOT, "quota")), TrainingError)
    for fault in (
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ValueError("x"),
        OSError("a fault of ours"),
    ):
        assert told(fault) is fault


def test_a_connection_that_is_lost_is_no_matter_of_files() -> None:
    with pytest.raises(ConnectionResetError), refusals_told(Path("x")):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_a_long_name_is_shortened() -> None:
    assert len(refusal(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), Path("y"))) < 300


def test_a_directory_that_can_be_made_is_writable_and_not_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "a/b", RecipeError)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "file: Not a directory; a file stands where"),
        ("file/below", "Not a directory; a file stands where"),
        ("n" * 256, "File name too long; give a shorter name"),
        ("loop/x", "the links lead in a circle"),
        ("nowhere", "a link that leads nowhere"),
    ],
)
def test_a_directory_that_cannot_be(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError) as raised:
        check_writable(tmp_path / path, RecipeError)
    assert message in str(raised.value)


def test_a_directory_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(RecipeError, match="Permission denied; name a place that you may write"):
        check_writable(tmp_path / "run", RecipeError)
