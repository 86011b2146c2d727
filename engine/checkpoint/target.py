"""A model on disk in the making: which tensor goes into which file, and one file after another.

That a file is there does not say that it is whole: writing.py keeps beside it that it is. The formats stand in hf.py,
tensorfile.py and dcpfile.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from paralign.models.weights import Blocks, Rule

from .dcpfile import CheckpointFileWriter, Stretch, write_metadata
from .hf import shard_plan, write_index
from .tensorfile import TensorFileWriter

Content = Sequence[tuple[Rule, Sequence[str]]]  # rules in order, and the names of their tensors in a file


class Target(Protocol):
    """A model that is written file by file.

    Attributes:
        kind: `hf` or `native`.
        assets: where config and tokenizer go.
        files: names of the files.
        facts: for each file what `write` returned; to be set before `finish`.
    """

    kind: str
    directory: Path
    assets: Path
    files: list[str]
    facts: Mapping[str, Any]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all the tensors."""

    def file_bytes(self, file: str) -> int:
        """Bytes of a file's tensors."""

    def content(self, file: str) -> Content:
        """What a file holds, in the order in which `write` wants it."""

    def write(self, file: str, tensors: Iterable[tuple[str, Blocks]]) -> Any:
        """Writes one file, and returns what `finish` must know of it, as JSON.

        A tensor must not change until the one after the next is asked for.
        """

    def finish(self) -> None:
        """Makes a model of the files."""


class HFTarget:
    """A Hugging Face directory: safetensors and an index."""

    kind = "hf"

    def __init__(
        self, directory: Path, rules: Sequence[Rule], *, dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        self.directory = self.assets = directory
        self.facts: Mapping[str, Any] = {}
        self._plan = shard_plan([rules], dtype=dtype, max_shard_bytes=max_shard_bytes)
        self._files = {file.name: file for file in self._plan.files}
        self.files = list(self._files)
        file_of = {name: file.name for file in self._plan.files for name in file.shapes}
        self._content: dict[str, list[tuple[Rule, list[str]]]] = {file: [] for file in self.files}
        for rule in rules:
            for file in dict.fromkeys(file_of[name] for name in rule.hf):
                self._content[file].append((rule, [name for name in rule.hf if file_of[name] == file]))

    @property
    def tensor_bytes(self) -> int:
        return self._plan.tensor_bytes

    def file_bytes(self, file: str) -> int:
        return sum(map(math.prod, self._files[file].shapes.values())) * self._plan.dtype.itemsize

    def content(self, file: str) -> Content:
        return self._content[file]

    def write(self, file: str, tensors: Iterable[tuple[str, Blocks]]) -> Any:
        path = self.directory / file
        writer = TensorFileWriter(path, self._files[file].shapes, self._plan.dtype)
        for name, parts in tensors:
            writer.write(name, parts)
        writer.close()
        assert not writer.missing
        assert path.stat().st_size == writer.size
        return None

    def finish(self) -> None:
        write_index(self.directory, self._plan)


class NativeTarget:
    """A native checkpoint without an optimizer: a model to start from."""

    kind = "native"

    def __init__(
        self, directory: Path, rules: Sequence[Rule], *, dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        self.directory, self.assets = directory, directory / "hf"
        self.facts: Mapping[str, Any] = {}
        self._dtype = dtype
        self._shapes = {rule.native: rule.native_shape for rule in rules}
        groups: list[list[Rule]] = []
        room = -1
        for rule in rules:
            nbytes = math.prod(rule.native_shape) * dtype.itemsize
            if nbytes > room:
                groups.append([])
                room = max_shard_bytes
            groups[-1].append(rule)
            room -= nbytes
        self._content = {f"__{i}_0.distcp": group for i, group in enumerate(groups)}
        self.files = list(self._content)

    @property
    def tensor_bytes(self) -> int:
        return sum(map(self.file_bytes, self.files))

    def file_bytes(self, file: str) -> int:
        return sum(math.prod(rule.native_shape) for rule in self._content[file]) * self._dtype.itemsize

    def content(self, file: str) -> Content:
        return [(rule, [rule.native]) for rule in self._content[file]]

    def write(self, file: str, tensors: Iterable[tuple[str, Blocks]]) -> Any:
        writer = CheckpointFileWriter(self.directory / file)
        for name, parts in tensors:
            writer.write(name, self._shapes[name], self._dtype, parts)
        writer.close()
        return {name: [stretch.offset, stretch.length] for name, stretch in writer.stretches.items()}

    def finish(self) -> None:
        stretches = {
            name: Stretch(file, *place)
            for file, places in self.facts.items()
            for name, place in places.items()
        }
        write_metadata(self.directory, self._shapes, self._dtype, stretches)
