"""Hugging Face directories: reading by slices, writing by shards.

Everything is checked when a directory is opened, from headers and file sizes, so that a run never dies of a
bad shard after its queue time. Writing needs no collective: which tensor goes into which file is a pure
function, stages write their own files under temporary names, and the last rename makes them a model.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paralign.models import arch_from_hf, rules_for
from paralign.models.arch import Arch, shown
from paralign.models.errors import WeightsError
from paralign.models.weights import Rule, Shape, Views, check_shape

from ..data.tokenizer import PROCESSOR_TEMPLATE, TOKENIZER_FILES
from ..files.json_file import json_text, read_json
from ..files.whole_file import write_whole
from .file_manifest import digest_directory
from .manifest import Digest, write_manifest
from .rawfile import Behind, MappedFiles
from .tensor_digest import digest, refuse_other, tensor_fault
from .tensorfile import DTYPES, Entry, MappedFile, TensorFileWriter, file_layout, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def is_native(directory: Path) -> bool:
    """Whether a directory holds a native checkpoint, finished or not."""
    return (directory / ".metadata").is_file() or (directory / "hf" / "config.json").is_file()


def assets_of(directory: Path) -> Path:
    """Where config and tokenizer of the model in a directory are."""
    return directory / "hf" if is_native(directory) else directory


def arch_of(directory: Path) -> Arch:
    """Shape facts of the model in a directory of either form, from its `config.json`; raises WeightsError."""
    assets = assets_of(directory)
    config = _read_json(assets / "config.json")
    try:
        return arch_from_hf(config)
    except WeightsError as error:
        raise WeightsError(f"{assets}/{error}") from None


class HFReader:
    """A Hugging Face directory as a `ModelSource`; every check is done when it is made.

    `rule.slice(reader.read, tp_rank, tp_size)` reads the share of a rank.

    Raises:
        WeightsError: an unknown model; a missing or truncated file; an index that disagrees with the files;
            a tensor that is missing, unknown, of another shape, or quantised.
    """

    kind = "hf"

    def __init__(self, directory: Path) -> None:
        self.directory = self.assets = directory
        self.arch = arch_of(directory)
        self.rules = rules_for(self.arch)
        self.expected: Mapping[str, Digest] = {}
        self._files: dict[str, MappedFile] = {}
        headers = _read_headers(directory)
        self.files = [directory / file for file in headers]
        for file, entries in headers.items():
            mapped = MappedFile(directory / file, entries)
            self._files |= dict.fromkeys(entries, mapped)
        self._mapped = MappedFiles(file.bytes for file in set(self._files.values()))
        self.own, self.release = self._mapped.own, self._mapped.release
        _check_tensors(
            directory,
            {name: entry for entries in headers.values() for name, entry in entries.items()},
            self.rules,
            tied=self.arch.tied,
        )

    def read(self, name: str) -> Tensor:
        """The whole tensor, memory-mapped, in the dtype of the file: slice it to read only the slice.

        Raises:
            WeightsError: a file has changed since the directory was opened.
        """
        self._mapped.check()
        return self._files[name][name]

    def dtype(self) -> torch.dtype:
        found = {self.read(name).dtype: name for rule in self.rules for name in rule.hf}
        return one_dtype(found, self.directory, WeightsError)

    def nbytes(self, rule: Rule) -> int:
        return sum(self.read(name).nbytes for name in rule.hf)

    def stored(self, rule: Rule) -> Mapping[str, Views]:
        return {name: [self.read(name)] for name in rule.hf}

    def tensors(self, rule: Rule) -> Mapping[str, Views]:
        return self.stored(rule)

    def native(self, rule: Rule) -> Views:
        return rule.parts(self.read)

    def check(self, rule: Rule) -> None:
        """Raises WeightsError unless a rule's tensors are what the manifest says, if it says anything."""
        for name in rule.hf if self.expected else ():
            file = self._files[name]
            fault = tensor_fault(rule.shapes[name], [file[name]], self.expected.get(name), file.bytes)
            refuse_other(file.path, name, fault)


def one_dtype(dtypes: Mapping[torch.dtype, str], directory: Path, error: type[Exception]) -> torch.dtype:
    """The only key of `dtypes`, each with a tensor that has it; raises `error` if there are several."""
    if len(dtypes) > 1:
        examples = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise error(f"{directory}: its weights are of several dtypes: {examples}; choose one with --dtype")
    return next(iter(dtypes))


@dataclass(frozen=True)
class ShardFile:
    """One file of an export: its final name, the pipeline stage that writes it, its tensors in order."""

    name: str
    stage: int
    shapes: Mapping[str, Shape]


@dataclass(frozen=True)
class ShardPlan:
    """Which tensor goes into which file, the same on every rank."""

    dtype: torch.dtype
    files: tuple[ShardFile, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all the tensors, without headers."""
        return self.parameters * self.dtype.itemsize

    @property
    def parameters(self) -> int:
        """Elements of all the tensors."""
        return sum(math.prod(shape) for file in self.files for shape in file.shapes.values())


def shard_plan(stages: Sequence[Sequence[Rule]], *, dtype: torch.dtype, max_shard_bytes: int) -> ShardPlan:
    """Fills files in the order of the rules; a file never spans two stages.

    Args:
        stages: for each writer (pipeline stage) the rules whose tensors it writes; together each rule once.
        dtype: of every tensor written.
        max_shard_bytes: most bytes of tensors in a file; a larger tensor has a file of its own.

    Raises:
        ValueError: two rules hold the same tensor, as when two stages both export a tied embedding.
    """
    files: list[tuple[int, dict[str, Shape]]] = []
    for stage, rules in enumerate(stages):
        room = -1
        for rule in rules:
            for name, shape in zip(rule.hf, rule.hf_shapes):
                nbytes = math.prod(shape) * dtype.itemsize
                if nbytes > room:
                    files.append((stage, {}))
                    room = max_shard_bytes
                files[-1][1][name] = shape
                room -= nbytes
    held = [name for _, shapes in files for name in shapes]
    if len(held) != len(set(held)):
        raise ValueError(f"planned twice: {_some({name for name in held if held.count(name) > 1})}")
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = [SINGLE]
    return ShardPlan(dtype, tuple(ShardFile(name, *file) for name, file in zip(names, files)))


class StageWriter:
    """Writes the files of one stage under temporary names; memory is bounded by one tensor.

    Tensors may come in any order; in the order of the plan one file is open at a time. `finish_export` gives
    the files their names once every stage has closed its writer.

    Raises:
        WeightsError: the directory already holds weights.
    """

    def __init__(self, directory: Path, plan: ShardPlan, stage: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        held = sorted(
            path.name for path in directory.iterdir() if path.name.endswith((".safetensors", INDEX))
        )
        if held:  # transformers would prefer a stale model.safetensors to our index
            raise WeightsError(f"{directory}: already holds {held[0]}; choose an empty directory")
        self._directory = directory
        self._plan = plan
        self._file_of = {name: file for file in plan.files if file.stage == stage for name in file.shapes}
        self._missing = set(self._file_of)
        self._open: dict[str, TensorFileWriter] = {}
        self._stage = stage
        self._hasher = Behind()
        self._digests: dict[str, dict[str, Any]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, cast to the plan's dtype; from any device.

        Raises:
            WeightsError: it has another shape than planned.
            ValueError: it is not this stage's, or was added before.
        """
        if name not in self._missing:
            raise ValueError(f"{name}: not planned for this stage, or added twice")
        file = self._file_of[name]
        check_shape(name, tensor.shape, file.shapes[name])
        if file.name not in self._open:
            path = _unfinished(self._directory, file)
            self._open[file.name] = TensorFileWriter(path, file.shapes, self._plan.dtype)
        writer = self._open[file.name]
        written = tensor.detach().to("cpu", self._plan.dtype).contiguous()
        writer.write(name, [written])
        self._hasher.submit(self._note, name, written)
        self._missing.discard(name)
        if not writer.missing:
            self._open.pop(file.name).close()

    def close(self) -> None:
        """Leaves the digests of the tensors for `finish_export`.

        Raises:
            ValueError: a tensor of this stage was never added.
        """
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were never added: {_some(self._missing)}")
        self._hasher.wait()
        write_whole(_digests_of(self._directory, self._stage), json.dumps(self._digests))

    def _note(self, name: str, tensor: Tensor) -> None:
        self._digests[name] = asdict(digest(tensor.shape, [tensor]))


def finish_export(directory: Path, plan: ShardPlan) -> None:
    """Gives all the files their names, the index and the manifest last.

    Called once, after every stage has closed its writer and all else is in the directory.

    Raises:
        WeightsError: a stage's file is not there in full.
    """
    for file in plan.files:
        path, (_, _, size) = _unfinished(directory, file), file_layout(file.shapes, plan.dtype)
        if not path.exists() or path.stat().st_size != size:
            raise WeightsError(
                f"{path}: stage {file.stage} did not write its {size} bytes; is it one file system?"
            )
    for file in plan.files:
        os.replace(_unfinished(directory, file), directory / file.name)
    write_index(directory, plan)
    digests: dict[str, Digest] = {}
    for stage in sorted({file.stage for file in plan.files}):
        noted = _digests_of(directory, stage)
        digests |= {name: Digest(**entry) for name, entry in json.loads(noted.read_text()).items()}
        noted.unlink()
    files = digest_directory(directory, without={file.name for file in plan.files})
    write_manifest(directory, files, digests)


def write_index(directory: Path, plan: ShardPlan) -> None:
    """Writes the index, where there are several files."""
    if len(plan.files) > 1:
        index = {
            "metadata": {"total_parameters": plan.parameters, "total_size": plan.tensor_bytes},
            "weight_map": {name: file.name for file in plan.files for name in file.shapes},
        }
        _write_json(directory / INDEX, index)


@dataclass(frozen=True)
class Scorer:
    """What config and tokenizer of a reward model say besides.

    Attributes:
        architecture: the class that opens it.
        pad_token, pad_token_id: transformers reads a score at the last token that is not this one, so that it
            must never end an answer.
    """

    architecture: str
    pad_token: str
    pad_token_id: int

    def config(self) -> dict[str, Any]:
        """Keys of `config.json`."""
        return {
            "architectures": [self.architecture],
            "id2label": {"0": "reward"},
            "label2id": {"reward": 0},
            "pad_token_id": self.pad_token_id,
        }


@dataclass(frozen=True)
class Assets:
    """What belongs next to the weights of a run.

    Attributes:
        model: directory of a model, in either form: its config.json and generation config.
        tokenizer: directory of the tokenizer.
        chat_template: jinja text to replace the tokenizer's own template, None to leave it.
        scorer: what makes it a model of one label, None for a language model.
        stop_token: id that ends an answer in training; whoever generates has to stop there.
    """

    model: Path
    tokenizer: Path
    chat_template: str | None = None
    scorer: Scorer | None = None
    stop_token: int | None = None


def copy_assets(assets: Assets, directory: Path, *, dtype: str) -> None:
    """Copies what belongs next to the weights: config, generation config, tokenizer; as much as there is.

    `config.json` keeps every key and order; only the dtype is set, under the key that the original uses.

    Args:
        dtype: float32, bfloat16 or float16.

    Raises:
        WeightsError: there is no `config.json`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model = assets_of(assets.model)
    config = _read_json(model / "config.json")
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = dtype
    scorer = assets.scorer
    _write_json(directory / "config.json", config | (scorer.config() if scorer else {}))
    for source, name in [
        (model, "generation_config.json"),
        *((assets.tokenizer, name) for name in TOKENIZER_FILES if name != PROCESSOR_TEMPLATE),
    ]:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    for source in sorted({model, assets.tokenizer}):  # auto_map of config.json names these
        for path in sorted(source.glob("*.py")):
            shutil.copyfile(path, directory / path.name)
    named = "additional_chat_templates"
    if (assets.tokenizer / named).is_dir():
        shutil.copytree(assets.tokenizer / named, directory / named, dirs_exist_ok=True)
    if assets.chat_template is not None:
        (directory / "chat_template.jinja").write_text(assets.chat_template, encoding="utf-8")
        tokenizer_config = directory / "tokenizer_config.json"
        if tokenizer_config.exists():  # where older readers look; two templates must not disagree
            content = _read_json(tokenizer_config)
            if "chat_template" in content:
                _write_json(tokenizer_config, content | {"chat_template": assets.chat_template})
    if assets.stop_token is not None and scorer is None:
        _stop_at(assets.stop_token, directory / "generation_config.json", config)
    if scorer is not None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (directory / name).is_file():
                _write_json(directory / name, _read_json(directory / name) | {"pad_token": scorer.pad_token})


def _stop_at(token: int, path: Path, config: Mapping[str, Any]) -> None:
    """Add a token to those that end generation, unless it is one: a base model's may know only its own eos."""
    generation = _read_json(path) if path.exists() else {}
    stated = generation.get("eos_token_id", config.get("eos_token_id"))
    known = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if token not in known:
        _write_json(path, generation | {"eos_token_id": [*known, token]})


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `512MiB`; GB is 10⁹ as in transformers, GiB is 2³⁰."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise WeightsError(
            f"max_shard_size: read {text!r}; expected a number and a unit, as in 5GB or 512MiB"
        )
    number, unit, binary = match.groups()
    return int(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")


def _read_headers(directory: Path) -> dict[str, dict[str, Entry]]:
    """Headers by file name, checked against the index where there is one."""
    shards = {path.name for path in directory.iterdir() if _SHARD.fullmatch(path.name)}
    if (directory / SINGLE).exists():
        if shards:
            raise WeightsError(
                f"{directory}: holds {_some(shards)} beside {SINGLE}; two saves are mixed: remove one"
            )
        return {SINGLE: read_header(directory / SINGLE)}
    if not (directory / INDEX).exists():
        found = sorted(
            path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")
        )
        raise WeightsError(
            f"{directory}: no {SINGLE} and no {INDEX}; found {_some(found) or 'no weights'}; "
            "save the model with transformers' save_pretrained"
        )
    weight_map = _read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{directory / INDEX}: no weight_map; download it again")
    indexed: dict[str, set[str]] = defaultdict(set)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise WeightsError(
                f"{directory / INDEX}: {name} in {shown(file)}; expected the name of a file next to it; "
                "download it again"
            )
        indexed[file].add(name)
    headers = {}
    for file, names in sorted(indexed.items()):
        headers[file] = read_header(directory / file)
        for extra, where in (
            (names - set(headers[file]), "the index"),
            (set(headers[file]) - names, "the file"),
        ):
            if extra:
                raise WeightsError(
                    f"{directory / file}: only {where} has {_some(extra)}; "
                    f"{INDEX} and the file belong to different saves; download both again"
                )
    if extra_files := shards - set(headers):
        raise WeightsError(
            f"{directory}: holds {_some(extra_files)}, which {INDEX} does not name; "
            "two saves are mixed: remove one"
        )
    return headers


def _check_tensors(directory: Path, found: Mapping[str, Entry], rules: Sequence[Rule], *, tied: bool) -> None:
    expected = {name: shape for rule in rules for name, shape in zip(rule.hf, rule.hf_shapes)}
    missing = [name for name in expected if name not in found]
    if missing:
        hint = "; config.json has tie_word_embeddings false" if missing == ["lm_head.weight"] else ""
        raise WeightsError(f"{directory}: lacks {_some(missing)}, which config.json calls for{hint}")
    unknown = [name for name in found if name not in expected and not _harmless(name, tied=tied)]
    if unknown:
        raise WeightsError(f"{directory}: holds {_some(unknown)}, which config.json does not call for")
    for name, shape in expected.items():
        entry = found[name]
        check_shape(f"{directory}: {name}", entry.shape, shape)
        if entry.dtype not in DTYPES:
            raise WeightsError(
                f"{directory}: {name}: dtype {entry.dtype}; expected one of {', '.join(DTYPES)}; "
                "give the unquantised weights"
            )


def _harmless(name: str, *, tied: bool) -> bool:
    """Tensors that some savers leave behind and transformers does not read."""
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _unfinished(directory: Path, file: ShardFile) -> Path:
    return directory / f"{file.name}.part"


def _digests_of(directory: Path, stage: int) -> Path:
    return directory / f"stage-{stage}.json.part"


def _some(names: Sequence[str] | set[str]) -> str:
    """The first three of some names, and how many more there are."""
    listed = sorted(names) if isinstance(names, set) else names
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(name[:200] for name in listed[:3]) + more


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise WeightsError(
            f"{path}: there is no such file; expected a Hugging Face model directory"
        ) from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: read {type(content).__name__}; expected an object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json_text(content, indent=2))
