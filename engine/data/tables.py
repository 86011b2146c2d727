"""Records, and rows of Parquet files and of saved `datasets` folders as records.

A folder is one that `Dataset.save_to_disk` wrote: state.json and Arrow files. pyarrow alone reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralign.models.errors import DataError

from .hashed_file import Digests, anywhere, in_order

if TYPE_CHECKING:  # a recipe of JSON files must not wait for pyarrow
    import pyarrow as pa

ROWS_PER_BATCH = 1000


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


def is_table(path: Path) -> bool:
    """Whether `path` is read as a table."""
    return path.is_dir() or path.suffix == ".parquet"


def table_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set, in order; DataError if the folder holds none."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise DataError(
            f"{folder}: holds a data set of several splits ({splits}); name one, such as {folder}/train"
        )
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / file["filename"] for file in state["_data_files"]]
    except FileNotFoundError:
        raise DataError(
            f"{folder}: a folder without state.json; expected one that Dataset.save_to_disk wrote, or a file"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}/state.json: not that of a saved data set ({error}); save it again"
        ) from None
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file, and {folder}/state.json names it; copy it again")
    return files


def table_records(path: Path, digests: Digests | None = None) -> Iterator[Record]:
    """The rows, numbered from 1.

    Arrow gives every struct the keys of all, null where a row has none: null keys inside a row are left out.

    Raises:
        DataError: no such file; not a table; files that are not what `digests` says.
    """
    import pyarrow as pa

    if not path.exists():
        raise DataError(f"{path}: no such file")
    row_number = 0
    try:
        batches = _folder_batches if path.is_dir() else _parquet_batches
        for batch, n_bytes in batches(path, digests):
            for row in batch.to_pylist():
                row_number += 1
                content = {key: _without_null(value) for key, value in row.items()}
                yield Record(row_number, content, n_bytes // batch.num_rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError, RecursionError) as error:
        kind = "a saved data set" if path.is_dir() else "a Parquet file"
        found = str(error).splitlines()[0]
        raise DataError(f"{path}: not {kind} that can be read ({found}); write it again") from None


def _folder_batches(folder: Path, digests: Digests | None) -> Iterator[tuple[pa.RecordBatch, int]]:
    import pyarrow as pa

    for path in table_files(folder):
        with in_order(path, digests) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield batch, batch.nbytes


def _parquet_batches(path: Path, digests: Digests | None) -> Iterator[tuple[pa.RecordBatch, int]]:
    from pyarrow import parquet

    with anywhere(path, digests) as file, parquet.ParquetFile(file) as table:
        bytes_per_row = path.stat().st_size / max(1, table.metadata.num_rows)
        for batch in table.iter_batches(ROWS_PER_BATCH):
            yield batch, round(batch.num_rows * bytes_per_row)


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
