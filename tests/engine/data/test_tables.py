import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from paralign.engine.data.config import SourceConfig
from paralign.engine.data.sources import content_files, decode, read_records, record_format
from paralign.engine.data.tables import ROWS_PER_BATCH
from paralign.models.errors import DataError

ROWS = [
    {"messages": [{"role": "user", "content": "a"}], "id": 1},
    {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}], "id": 2},
    {"messages": [{"role": "assistant", "tool_calls": [{"name": "g", "arguments": {"y": "b"}}]}], "id": 3},
]


def save_folder(folder: Path, rows: list[dict[str, object]], n_files: int = 2) -> Path:
    """What Dataset.save_to_disk leaves: Arrow streams and a state.json that names them."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    names = [f"data-{i:05d}-of-{n_files:05d}.arrow" for i in range(n_files)]
    for i, name in enumerate(names):
        part = table.slice(
            i * len(rows) // n_files, (i + 1) * len(rows) // n_files - i * len(rows) // n_files
        )
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


@pytest.fixture(params=["parquet", "folder"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "folder":
        return save_folder(tmp_path / "saved", ROWS)
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def test_rows_are_numbered_and_come_without_the_nulls_that_arrow_adds(table: Path):
    records = list(read_records(table))
    assert [record.line for record in records] == [1, 2, 3]
    assert [decode(record, table) for record in records] == ROWS
    assert record_format(SourceConfig(path=table)) == "messages"


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved"
    assert [decode(record, path) for record in read_records(path)] == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits \(train\); name one, such as .*splits/train"):
        next(read_records(tmp_path / "splits"))


def test_the_content_of_a_folder_is_that_of_its_arrow_files(tmp_path: Path):
    folder = save_folder(tmp_path / "saved", ROWS)
    assert [file.suffix for file in content_files(folder)] == [".arrow", ".arrow"]


def test_many_rows_come_in_order(tmp_path: Path):
    rows = [{"instruction": str(i), "output": "b"} for i in range(2 * ROWS_PER_BATCH + 1)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = list(read_records(tmp_path / "a.parquet"))
    assert [record.content for record in records] == rows
    assert records[-1].line == len(rows)
    assert sum(record.n_bytes for record in records) <= (tmp_path / "a.parquet").stat().st_size


def test_a_table_without_the_column_is_named_with_those_it_has(table: Path):
    with pytest.raises(DataError) as caught:
        record_format(SourceConfig(path=table, format="sharegpt"))
    assert str(caught.value) == (
        f"{table}: no column conversations, which format sharegpt needs; the table has messages, id; "
        "name it by columns: {conversations: …}"
    )
    renamed = SourceConfig(path=table, format="sharegpt", columns={"conversations": "messages"})
    assert record_format(renamed) == "sharegpt"
    with pytest.raises(DataError, match=r"no column chat,"):
        record_format(SourceConfig(path=table, format="messages", columns={"messages": "chat"}))


def test_what_is_no_table_is_named(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"a.parquet: not a Parquet file that can be read"):
        next(read_records(tmp_path / "a.parquet"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder: a folder without state.json"):
        next(read_records(tmp_path / "folder"))
    (tmp_path / "folder/state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    with pytest.raises(DataError, match=r"a.arrow: no such file, and .*state.json names it"):
        next(read_records(tmp_path / "folder"))
    (tmp_path / "folder/a.arrow").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"folder: not a saved data set that can be read"):
        next(read_records(tmp_path / "folder"))
    (tmp_path / "folder/state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state.json: not that of a saved data set"):
        next(read_records(tmp_path / "folder"))
    with pytest.raises(DataError, match=r"absent.parquet: no such file"):
        next(read_records(tmp_path / "absent.parquet"))


def test_an_empty_table_has_no_record(tmp_path: Path):
    parquet.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no record"):
        next(read_records(tmp_path / "a.parquet"))
