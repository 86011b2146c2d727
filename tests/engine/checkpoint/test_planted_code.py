"""Code planted in each kind of file that is opened: it never runs, and the error says what the file is.

What a training state holds besides is planted in `tests/distributed/test_resume.py`.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from torch.distributed.checkpoint.metadata import Metadata

from paralign.engine.checkpoint.convert import convert
from paralign.engine.checkpoint.merge import load_merge
from paralign.engine.checkpoint.source import open_source
from paralign.engine.columns.reference import MadeBy, read_reference
from paralign.engine.data.sources import read_records
from paralign.engine.data.tokenizer import open_tokenizer
from paralign.engine.run.check import check
from paralign.engine.run.recipe import load
from paralign.models.errors import ParalignError

from ...harm import Harm

MORE = r"holds more than (tensors|numbers).*nothing of it was run"


@pytest.fixture
def harm(project: Path) -> Iterator[Harm]:
    """A payload; at the end of the test it has not run. It would, where a file is opened without care."""
    planted = Harm(project / "it-ran")
    yield planted
    assert not planted.mark.exists()
    pickle.loads(pickle.dumps(planted))
    assert planted.mark.exists()


def _opened_by_check(*overrides: str) -> None:
    check(load(Path("recipe.yaml"), overrides))


def _opened_by_convert(*_: str) -> None:
    convert(Path("native"), Path("back"), progress=False)


@pytest.mark.parametrize("opening", [_opened_by_check, _opened_by_convert])
@pytest.mark.parametrize("whole", [True, False])
def test_metadata(native: Path, harm: Harm, opening: Callable[..., None], whole: bool) -> None:
    content: object = harm
    if not whole:  # hidden in a field of what is expected
        content = Metadata({}, planner_data=harm)
    (native / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ParalignError, match=rf"\.metadata: cannot be read \(it {MORE}"):
        opening("model.hf=native", "model.init=weights")


class EmptyToSome:
    """A dictionary that is empty to whoever asks for its items, and not to who asks for one of them."""

    def __init__(self, real: dict[Any, Any]) -> None:
        self.real = real

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"items": OrderedDict}, None, iter(self.real.items())


def test_metadata_that_hides_what_it_holds(native: Path) -> None:
    metadata = pickle.loads((native / ".metadata").read_bytes())
    metadata.state_dict_metadata = EmptyToSome(metadata.state_dict_metadata)
    (native / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ParalignError, match=rf"it {MORE}"):
        open_source(native)


@pytest.mark.parametrize("name", ["torch.distributed.checkpoint.metadata\nMetadata", "pathlib\nPosixPath"])
def test_metadata_that_changes_a_class(native: Path, name: str) -> None:
    """It names the class, and sets an attribute of it as if it were an instance with slots."""
    (native / ".metadata").write_bytes(f"c{name}\n(N}}S'planted'\nI1\nstb.".encode())
    with pytest.raises(ParalignError, match=r"\.metadata: cannot be read"):
        open_source(native)
    assert not hasattr(Metadata, "planted")
    assert not hasattr(Path, "planted")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeroes": lambda content: bytes(len(content)),
    "half": lambda content: content[: len(content) // 2],
    "flipped": lambda content: bytes(255 - byte for byte in content),
    "a pickle": lambda content: pickle.dumps({"a": 1}),
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    "one array": lambda content: _saved(np.save, np.arange(3)),
    "arrays": lambda content: _saved(np.savez, np.arange(3)),
}


def _saved(save: Callable[..., None], array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_what_is_only_damaged_is_called_that(
    project: Path, native: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = DAMAGE[damage]
    metadata = native / ".metadata"
    metadata.write_bytes(changed(metadata.read_bytes()))
    with pytest.raises(ParalignError, match=r"\.metadata: cannot be read \(.*\); copy the checkpoint again"):
        open_source(native)
    _opened_by_check()
    for file in ("samples.npz", "meta.json"):
        for path in project.glob(f"cache/*/{file}"):
            whole = path.read_bytes()
            path.write_bytes(changed(whole))
            (path.parent / "checksums.json").unlink(missing_ok=True)  # so that the file itself has to tell
            _opened_by_check()
            assert re.search(r"not a cache of tokens \(.*made anew", capsys.readouterr().err)
            assert path.read_bytes() == whole


def test_metadata_that_leads_out_of_the_directory(native: Path) -> None:
    metadata = pickle.loads((native / ".metadata").read_bytes())
    for item in metadata.storage_data.values():
        item.relative_path = "../model/model.safetensors"
    (native / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ParalignError, match=r"leads to \.\./model/model\.safetensors, outside the directory"):
        open_source(native)


def test_a_tensor(native: Path, harm: Harm) -> None:
    file = native / "__0_0.distcp"
    content = file.read_bytes()
    metadata = pickle.loads((native / ".metadata").read_bytes())
    for index, item in metadata.storage_data.items():
        saved = io.BytesIO()
        with zipfile.ZipFile(saved, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(harm))
            archive.writestr("archive/data/0", bytes(8))
        if index.fqn == "decoder.final_layernorm.weight":
            item.offset, item.length = len(content), len(saved.getvalue())
            file.write_bytes(content + saved.getvalue())
    (native / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ParalignError, match=rf"final_layernorm.weight: not a tensor .*it {MORE}"):
        _opened_by_convert()


DPO = [
    "objective={name: dpo, beta: 0.1}",
    "data.train=pairs.jsonl",
    "data.validation={}",
    "train.eval_every_steps=null",
]


@pytest.mark.parametrize(
    ("overrides", "file"),
    [([], "samples.npz"), (DPO, "samples.npz"), (DPO, "answers.npy")],
    ids=["chats", "answers", "answers' table"],
)
@pytest.mark.parametrize("checksums", [True, False], ids=["checksums", "none"])
def test_a_token_cache(
    project: Path,
    harm: Harm,
    overrides: list[str],
    file: str,
    checksums: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is made anew; of one of an older version, without checksums, the file itself has to tell."""
    pairs = [{"prompt": "hi " * (i % 5 + 1), "chosen": "yo", "rejected": "hi"} for i in range(40)]
    (project / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    _opened_by_check(*overrides)
    for path in project.glob(f"cache/*/{file}"):
        if file.endswith("npy"):
            np.save(path, np.array([harm], dtype=object), allow_pickle=True)
        else:
            with np.load(path) as table:
                columns = dict(table)
            np.savez(path, **columns | {"lengths": np.array([harm], dtype=object)})
        if not checksums:
            (path.parent / "checksums.json").unlink()
    _opened_by_check(*overrides)
    said = capsys.readouterr().err
    assert "made anew from the data" in said
    assert checksums or re.search(rf"not a cache of \w+ \(.*{MORE}", said)


@pytest.mark.parametrize("whole", [True, False])
def test_stored_reference_log_probabilities(project: Path, harm: Harm, whole: bool) -> None:
    path = project / "reference-0.npz"
    if whole:
        path.write_bytes(pickle.dumps(harm))
    else:
        np.savez(path, values=np.array([harm], dtype=object), made_by=np.array("{}"))
    with pytest.raises(ParalignError, match=rf"not a file of reference log-probabilities \(.*{MORE}"):
        read_reference(path, MadeBy("", "", ""))


def test_weights_that_torch_has_pickled(project: Path, harm: Harm) -> None:
    (project / "model/pytorch_model.bin").write_bytes(pickle.dumps(harm))
    with pytest.raises(ParalignError, match=r"found pytorch_model\.bin"):
        _opened_by_check("model.init=weights")


def test_code_beside_a_model_and_its_tokenizer(
    project: Path, harm: Harm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks whether to run it; even a user who says yes, or a script that does, runs nothing."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"import os\nos.mkdir({str(harm.mark)!r})\nclass Custom: pass\n"
    (project / "model/custom.py").write_text(code)
    for file, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        path = project / "model" / file
        name = "custom.Custom" if key == "AutoConfig" else ["custom.Custom", "custom.Custom"]
        changed = json.loads(path.read_text()) | {"auto_map": {key: name}}
        path.write_text(json.dumps(changed | {"model_type": "custom", "tokenizer_class": "Custom"}))
    with pytest.raises(ParalignError, match=r"model: no tokenizer can be opened"):
        open_tokenizer(project / "model")
    with pytest.raises(ParalignError):
        _opened_by_check()


def test_a_chat_template(project: Path, harm: Harm) -> None:
    reach = "{{ cycler.__init__.__globals__.os.mkdir('" + str(harm.mark) + "') }}"
    (project / "mine.jinja").write_text(reach + "{{ messages[0].content }}")
    with pytest.raises(ParalignError, match=r"chats?\.jsonl:1|train\.jsonl:1"):
        _opened_by_check("data.chat_template=mine.jinja")


@pytest.mark.parametrize("opening", [lambda path: load(path, ()), load_merge], ids=["recipe", "merge"])
def test_yaml(project: Path, harm: Harm, opening: Callable[[Path], object]) -> None:
    path = project / "planted.yaml"
    path.write_text(f"objective: !!python/object/apply:os.mkdir [{harm.mark}]\nrun_dir: runs\n")
    with pytest.raises(ParalignError, match=r"planted\.yaml:1 objective"):
        opening(path)


def test_a_table(project: Path, harm: Harm) -> None:
    """pyarrow before 14.0.1 unpickled what a column says of its type."""
    said = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(harm)}
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=said)])
    folder = project / "saved"
    folder.mkdir()
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_table(pa.table({"prompt": ["hi"]}, schema=schema))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    assert next(read_records(folder)).content == {"prompt": "hi"}
