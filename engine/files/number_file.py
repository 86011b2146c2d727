"""A file of numbers, read stretch by stretch, of which only what is asked for is in memory.

It is not memory-mapped: a process that reads a mapped page of a file that was cut meanwhile dies by SIGBUS, at no
place that an error could name. A read that ends too early is an error like any other.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from paralign.models.errors import DataError

from .stretch import read_stretch


class NumberFile:
    """Numbers of one type, end to end, and nothing else.

    Attributes:
        path, dtype: what it was opened with.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: its size is not that of whole numbers.
    """

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._file = path.open("rb", buffering=0)
        self.nbytes = os.fstat(self._file.fileno()).st_size
        if self.nbytes % self.dtype.itemsize:
            raise ValueError(
                f"{path.name} has {self.nbytes:,} bytes, which is no whole number of {self.dtype}"
            )

    def __len__(self) -> int:
        return self.nbytes // self.dtype.itemsize

    def __getitem__(self, stretch: slice) -> np.ndarray:
        """The numbers of a stretch, read now.

        Raises:
            DataError: the file is shorter than when it was opened, or can no longer be read.
        """
        start, stop, step = stretch.indices(len(self))
        if step != 1:
            raise ValueError("expected a stretch without gaps")
        numbers = np.empty(max(0, stop - start), dtype=self.dtype)
        buffer, at = numbers.view(np.uint8).data, start * self.dtype.itemsize
        try:
            n_bytes = read_stretch(self._file.fileno(), buffer, at)
        except OSError as error:
            raise DataError(
                f"{self.path}: can no longer be read ({error}); mend the disk, start again"
            ) from None
        if n_bytes < len(buffer):
            raise DataError(
                f"{self.path}: was cut to {at + n_bytes:,} of {self.nbytes:,} bytes since it was opened; start "
                "again, and it is made anew; let nothing write to it during a run"
            )
        return numbers

    def at(self, places: np.ndarray) -> np.ndarray:
        """The numbers at some places."""
        return np.concatenate([self[i : i + 1] for i in places.tolist()] or [np.empty(0, dtype=self.dtype)])
