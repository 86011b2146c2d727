"""What `paralign score` reads, before any model is opened."""

from __future__ import annotations

from pathlib import Path

from paralign.engine.run.score_file import _read


def test_a_file_may_have_any_name(project: Path) -> None:
    data = (project / "chat.jsonl").rename(project / "chats of may.jsonl")
    lines, groups = _read(Path("model"), data, "chatml", 64)
    assert lines == [1, 2, 3, 4]
    assert len(groups) == 4
