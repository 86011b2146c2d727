"""A model on disk in the making: which tensor goes into which file, and one file after another.

That a file is there does not say that it is whole: writing.py notes that in a file next to it. The formats stand
in hf.py, tensorfile.py and dcpfile.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paralign.models.weights import Rule, Views

from .dcpfile import CheckpointFileWriter, Stretch, write_metadata
from .hf import shard_plan, write_index
from .tensorfile import TensorFileWriter

Content = Sequence[tuple[Rule, Sequence[str]]]  # rules in order, and the names of their tensors in a file


class Target:
    """A model that is written file by file.

    Attributes:
        kind: `hf` or `native`.
        assets: where config and tokenizer go.
        files: their names.
        content: for each file what it holds, in the order in which `write` wants it.
        facts: for each file what `write` returned; to be set before `finish`.
    """

    kind: str

    def __init__(
        self, directory: Path, assets: Path, content: Mapping[str, Content], dtype: torch.dtype
    ) -> None:
        self.directory, self.assets = directory, assets
        self.content, self.files = content, list(content)
        self.facts: Mapping[str, Any] = {}
        self._dtype = dtype

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all the tensors."""
        return sum(map(self.file_bytes, self.files))

    def file_bytes(self, file: str) -> int:
        """Bytes of a file's tensors."""
        return sum(math.prod(shape) for shape in self._shapes(file).values()) * self._dtype.itemsize

    def write(self, file: str, tensors: Iterable[tuple[str, Views]]) -> Any:
        """Writes one file, and returns what `finish` must know of it, as JSON.

        A tensor must not change until the one after the next is asked for.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Makes a model of the files."""
        raise NotImplementedError

    def _shapes(self, file: str) -> dict[str, tuple[int, ...]]:
        return {name: rule.shapes[name] for rule, names in self.content[file] for name in names}


class HFTarget(Target):
    """A Hugging Face directory: safetensors and an index."""

    kind = "hf"

    def __init__(
        self, directory: Path, rules: Sequence[Rule], *, dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        self._plan = shard_plan([rules], dtype=dtype, max_shard_bytes=max_shard_bytes)
        file_of = {name: file.name for file in self._plan.files for name in file.shapes}
        content: dict[str, list[tuple[Rule, list[str]]]] = {file.name: [] for file in self._plan.files}
        for rule in rules:
            for file in dict.fromkeys(file_of[name] for name in rule.hf):
                content[file].append((rule, [name for name in rule.hf if file_of[name] == file]))
        super().__init__(directory, directory, content, dtype)

    def write(self, file: str, tensors: Iterable[tuple[str, Views]]) -> Any:
        path = self.directory / file
        writer = TensorFileWriter(path, self._shapes(file), self._dtype)
        for name, parts in tensors:
            writer.write(name, parts)
        writer.close()
        assert not writer.missing
        assert path.stat().st_size == writer.size
        return None

    def finish(self) -> None:
        write_index(self.directory, self._plan)


class NativeTarget(Target):
    """A native checkpoint without an optimizer: a model to start from."""

    kind = "native"

    def __init__(
        self, directory: Path, rules: Sequence[Rule], *, dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        groups: list[list[tuple[Rule, list[str]]]] = []
        room = -1
        for rule in rules:
            nbytes = math.prod(rule.native_shape) * dtype.itemsize
            if nbytes > room:
                groups.append([])
                room = max_shard_bytes
            groups[-1].append((rule, [rule.native]))
            room -= nbytes
        content = {f"__{i}_0.distcp": group for i, group in enumerate(groups)}
        super().__init__(directory, directory / "hf", content, dtype)

    def write(self, file: str, tensors: Iterable[tuple[str, Views]]) -> Any:
        writer = CheckpointFileWriter(self.directory / file)
        shapes = self._shapes(file)
        for name, parts in tensors:
            writer.write(name, shapes[name], self._dtype, parts)
        writer.close()
        return {name: [stretch.offset, stretch.length] for name, stretch in writer.stretches.items()}

    def finish(self) -> None:
        shapes = {name: shape for file in self.files for name, shape in self._shapes(file).items()}
        stretches = {
            name: Stretch(file, *place)
            for file, places in self.facts.items()
            for name, place in places.items()
        }
        write_metadata(self.directory, shapes, self._dtype, stretches)
