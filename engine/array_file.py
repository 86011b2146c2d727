"""NumPy's files, opened for numbers only. Owns no meaning of an array."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def read_array(path: Path) -> np.ndarray:
    """The array of a `.npy` file; raises OSError, or ValueError if it is damaged or holds more than numbers."""
    with _numbers_only():
        return np.load(path, allow_pickle=False)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of a `.npz` file, by name; raises as `read_array`, and KeyError for one that it lacks."""
    with _numbers_only(), np.load(path, allow_pickle=False) as file:
        return [file[name] for name in names]


@contextmanager
def _numbers_only() -> Iterator[None]:
    try:
        yield
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(
            "it is damaged, or holds more than numbers and could run code; nothing of it was run"
        ) from None
