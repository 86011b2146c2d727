"""What an attacker would plant in a file: an object that calls something when it is unpickled."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class Harm:
    """Unpickles as a call that makes the directory `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)
