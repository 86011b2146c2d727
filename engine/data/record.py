"""A record as it came out of a file, before its meaning is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stands.

    Attributes:
        line: it begins at, from 1; of a table, its row.
        content: JSON as text or as UTF-8, not yet decoded; of a table, the row.
        n_bytes: its share of the file.
    """

    line: int
    content: str | bytes | dict[str, Any]
    n_bytes: int
