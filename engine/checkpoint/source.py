"""A model on disk, whichever way it is kept: one rule's tensors at a time.

A directory with `.metadata` is a native checkpoint, whose config and tokenizer are in `hf/`; any other is a
Hugging Face directory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from paralign.models import rules_for
from paralign.models.arch import Arch
from paralign.models.errors import CheckpointError, WeightsError
from paralign.models.weights import Rule, Views, Vocabulary

from .dcpfile import CheckpointFiles
from .file_manifest import broken_files, share_by_size
from .hf import HFReader, arch_of, is_native, one_dtype
from .manifest import MANIFEST, Digest, Manifest, read_manifest
from .tensor_digest import refuse_other, tensor_fault
from .unpickle import METADATA

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


class ModelSource(Protocol):
    """The tensors of a model.

    Attributes:
        assets: the folder with config and tokenizer.
        files: those with the weights.
        arch, rules: from its config.
        kind: `hf` or `native`.
        expected: what the manifest says of the tensors, by the names that they have on disk; may be empty.
    """

    directory: Path
    assets: Path
    files: list[Path]
    arch: Arch
    rules: tuple[Rule, ...]
    kind: str
    expected: Mapping[str, Digest]

    def dtype(self) -> torch.dtype:
        """The one dtype of all the tensors; raises if there are several."""

    def nbytes(self, rule: Rule) -> int:
        """Bytes of a rule's tensors, without reading them."""

    def stored(self, rule: Rule) -> Mapping[str, Views]:
        """A rule's tensors under the names that they have on disk, without vocabulary padding."""

    def tensors(self, rule: Rule) -> Mapping[str, Views]:
        """A rule's tensors by Hugging Face name; read-only, they may be the file itself."""

    def native(self, rule: Rule) -> Views:
        """The whole native tensor of a rule; read-only, it may be the file itself."""

    def read(self, name: str) -> Tensor:
        """One tensor by Hugging Face name: what `Rule.slice` asks for."""

    def check(self, rule: Rule) -> None:
        """Reads a rule's tensors; raises WeightsError unless they are what was written, as far as that is known."""

    def own(self, block: Tensor) -> Tensor:
        """The block in memory of its own, where it is mapped; raises WeightsError if the file has changed."""

    def release(self) -> None:
        """Drops the pages of the files that reading has brought into memory; raises WeightsError as `own`."""


class NativeSource:
    """A native checkpoint, of a run or of `convert`.

    Raises:
        CheckpointError: not finished; a tensor is missing, unknown, or of another shape than its config says.
    """

    kind = "native"

    def __init__(self, directory: Path) -> None:
        self.directory, self.assets = directory, directory / "hf"
        for needed in (METADATA, "hf/config.json"):
            if not (directory / needed).is_file():
                inside = sorted(path.name for path in directory.glob("iter_*"))
                remedy = f"give {directory / inside[-1]}" if inside else "did the save finish?"
                raise CheckpointError(f"{directory}: not a checkpoint, {needed} is missing; {remedy}")
        self.arch = arch_of(self.assets)
        self.rules = rules_for(self.arch)
        self._checkpoint = CheckpointFiles(directory)
        self.own = self._checkpoint.own
        self.files = self._checkpoint.files
        self._rule_of = {name: rule for rule in self.rules for name in rule.hf}
        self._last: tuple[str, Mapping[str, Tensor]] = ("", {})
        self.expected: Mapping[str, Digest] = {}
        self._check_shapes()

    def _check_shapes(self) -> None:
        stored = self._checkpoint.stored
        expected = {rule.native: rule for rule in self.rules}
        for name, rule in expected.items():
            if name not in stored:
                raise CheckpointError(f"{self.directory}: lacks {name}, which hf/config.json calls for")
            found, shape = tuple(stored[name].size), rule.native_shape
            padded = isinstance(rule, Vocabulary) and found[0] > shape[0] and found[1:] == shape[1:]
            if found != shape and not padded:
                raise CheckpointError(
                    f"{self.directory}: {name}: found shape {found}, hf/config.json calls for {shape}"
                )
        for name in stored:
            if name.startswith(MODEL_PREFIXES) and name not in expected:
                raise CheckpointError(
                    f"{self.directory}: holds {name}, which hf/config.json does not call for"
                )

    def dtype(self) -> torch.dtype:
        stored = self._checkpoint.stored
        found = {stored[rule.native].properties.dtype: rule.native for rule in self.rules}
        return one_dtype(found, self.directory, CheckpointError)

    def nbytes(self, rule: Rule) -> int:
        dtype = self._checkpoint.stored[rule.native].properties.dtype
        return math.prod(rule.native_shape) * dtype.itemsize

    def native(self, rule: Rule) -> Views:
        return [self._whole(rule)]

    def stored(self, rule: Rule) -> Mapping[str, Views]:
        return {rule.native: self.native(rule)}

    def tensors(self, rule: Rule) -> Mapping[str, Views]:
        return rule.hf_parts(self._whole(rule))

    def read(self, name: str) -> Tensor:
        rule = self._rule_of[name]
        native, tensors = self._last
        if native != rule.native:  # q, k and v are asked for one after another
            tensors = rule.join([self._whole(rule)])
            self._last = rule.native, tensors
        return tensors[name]

    def check(self, rule: Rule) -> None:
        if not self.expected:  # of a run, whose files' digests take in the optimizer's state
            self._checkpoint.check(rule.native)
            return
        for name, parts in self.stored(rule).items():
            refuse_other(
                self._checkpoint.files_of(name)[0],
                name,
                tensor_fault(rule.shapes[name], parts, self.expected.get(name), self._checkpoint),
            )

    def release(self) -> None:
        self._last = "", {}
        self._checkpoint.release()

    def _whole(self, rule: Rule) -> Tensor:
        return self._checkpoint.read(rule.native).narrow(0, 0, rule.native_shape[0])


def open_source(directory: Path) -> ModelSource:
    """The model in a directory. Files that belong to it are as its manifest says, where it has one.

    Raises:
        WeightsError, CheckpointError: it cannot be read as stated.
    """
    manifest = read_manifest(directory)
    if manifest is not None:
        _refuse_broken(directory, manifest)
    source = open_unchecked(directory)
    if manifest is not None:
        source.expected = manifest.tensors
    return source


def check_share(source: ModelSource, rank: int, n_ranks: int) -> None:
    """Reads one rank's share of a model, by size; together the ranks read each tensor once.

    Raises:
        WeightsError: a tensor is not what was written, as far as the source says what that was.
    """
    rules = {rule.native: rule for rule in source.rules}
    sizes = {name: source.nbytes(rule) for name, rule in rules.items()}
    for name in share_by_size(sizes, rank, n_ranks):
        source.check(rules[name])
        source.release()


def open_unchecked(directory: Path) -> ModelSource:
    """The model in a directory, whatever a manifest says; raises as `open_source`."""
    if is_native(directory) or sorted(directory.glob("iter_*")):
        return NativeSource(directory)
    return HFReader(directory)


def _refuse_broken(directory: Path, manifest: Manifest) -> None:
    """Raises WeightsError where a file that reading a model needs is not as the manifest says.

    Of a run's checkpoint these are not the optimizer's, and its tensors are checked one by one.
    """
    needed = [
        name
        for name in manifest.files
        if not is_native(directory) or name == METADATA or name.startswith("hf/")
    ]
    if faults := broken_files(directory, needed):
        raise WeightsError(
            f"{directory / faults[0]}, by {directory / MANIFEST}; copy it again, or, if it was changed on purpose, "
            "take its entry out of the manifest"
        )
