"""NumPy's files, opened for numbers only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile


def read_array(path: Path) -> np.ndarray:
    """The array of a `.npy` file; raises OSError, or ValueError if it is damaged or holds more than numbers."""
    with _numbers_only():
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("it holds several arrays")
        return found


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of a `.npz` file, by name; raises as `read_array`, also for one that it lacks."""
    with _numbers_only():
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, NpzFile):
            raise ValueError("it holds one array")
        with found:
            return [found[name] for name in names]


@contextmanager
def _numbers_only() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of a file that is not one, numpy raises anything
        if "allow_pickle" not in str(error):
            raise ValueError(str(error) or type(error).__name__) from None
        raise ValueError(
            "it is damaged, or holds more than numbers and could run code; nothing of it was run"
        ) from None
