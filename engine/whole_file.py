"""Small files that are there whole or not at all. Owns no format."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside `path`, then rename: whoever reads it meets the old content or the new; text is UTF-8."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
