"""JSON files that somebody else has written: whatever is wrong with one is an OSError or a ValueError."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MOST_BYTES = 10**8  # the limit of a safetensors header; the largest tokenizers have a third of it
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no file, too large, not UTF-8, not JSON, or nested too deeply.
    """
    if path.exists() and not path.is_file():  # a pipe would be read for ever
        raise ValueError("not a file")
    with path.open("rb") as file:
        return parse_json(file.read(MOST_BYTES + 1))


def parse_json(content: bytes) -> Any:
    """Raises ValueError as `read_json`."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    try:
        return json.loads(content.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_text(content: Any, *, indent: int) -> str:
    """JSON of a file for people, in their own letters; with escapes only where a string is no Unicode text."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return json.dumps(content, indent=indent) + "\n"
