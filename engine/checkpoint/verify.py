"""Models on disk against their manifest, and against each other, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paralign.models.errors import ParalignError, WeightsError
from paralign.models.weights import Rule, Views, bit_equal, in_blocks

from .file_manifest import file_fault
from .manifest import MANIFEST, Digest, read_manifest
from .rawfile import lightly
from .source import ModelSource, open_unchecked
from .tensor_digest import tensor_fault
from .workers import ByteBar, over


@dataclass(frozen=True)
class Difference:
    """A tensor or a file that is not as it should be, and in what."""

    name: str
    what: str


def check_against_manifest(directory: Path, *, workers: int = 1) -> list[Difference]:
    """Reads every file and tensor that a directory's manifest names, and compares.

    The directory may be a model in either form, or a run's checkpoint.

    Raises:
        WeightsError, CheckpointError: there is no manifest, or the directory cannot be read at all.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise WeightsError(
            f"{directory / MANIFEST}: there is no such file; `paralign convert` and runs write one, "
            "or give a second directory"
        )
    with ByteBar(shown=True) as bar:
        advance = bar.task("files", total=sum(file.bytes for file in manifest.files.values()))
        faults = over(
            manifest.files.items(),
            lambda item: Difference(item[0], file_fault(directory / item[0], item[1], advance) or ""),
            workers,
        )
    files = [fault for fault in faults if fault.what]
    if not manifest.tensors:
        return files
    try:
        return files + _tensors_differ(open_unchecked(directory), manifest.tensors, workers)
    except ParalignError as error:
        if not files:
            raise
        return [*files, Difference("tensors", f"not checked: {error}")]


def _tensors_differ(source: ModelSource, expected: Mapping[str, Digest], workers: int) -> list[Difference]:
    def check(rule: Rule) -> list[Difference]:
        found = [
            Difference(name, words)
            for name, parts in source.stored(rule).items()
            if (words := tensor_fault(rule.shapes[name], parts, expected.get(name), source))
        ]
        source.release()
        return found

    differences = _over_rules(check, source, workers)
    held = {name for rule in source.rules for name in (rule.hf if source.kind == "hf" else (rule.native,))}
    return differences + [Difference(name, "missing") for name in expected if name not in held]


def compare(left: Path, right: Path, *, workers: int = 1) -> list[Difference]:
    """Compares two models bit by bit under their Hugging Face names; each may be of either kind.

    Raises:
        WeightsError, CheckpointError: a directory cannot be read at all.
    """
    ours, theirs = open_unchecked(left), open_unchecked(right)
    rules_there = {rule.native: rule for rule in theirs.rules}

    def check(rule: Rule) -> list[Difference]:
        if rule.native not in rules_there:
            return [Difference(name, f"only in {left}") for name in rule.hf]
        other = rules_there[rule.native]
        others = theirs.tensors(other)
        found = []
        for name, parts in ours.tensors(rule).items():
            if name not in others:
                found.append(Difference(name, f"only in {left}"))
            elif rule.shapes[name] != other.shapes[name]:
                words = f"shape {list(rule.shapes[name])} and {list(other.shapes[name])}"
                found.append(Difference(name, words))
            elif words := _values_differ(parts, others[name], ours, theirs):
                found.append(Difference(name, words))
        ours.release()
        theirs.release()
        return found

    differences = _over_rules(check, ours, workers)
    here = {name for rule in ours.rules for name in rule.hf}
    return differences + [
        Difference(name, f"only in {right}") for rule in theirs.rules for name in rule.hf if name not in here
    ]


def _over_rules(
    check: Callable[[Rule], list[Difference]], source: ModelSource, workers: int
) -> list[Difference]:
    with ByteBar(shown=True) as bar:
        advance = bar.task("verifying", total=sum(map(source.nbytes, source.rules)))

        def checked(rule: Rule) -> list[Difference]:
            found = check(rule)
            advance(source.nbytes(rule))
            return found

        return [difference for found in over(source.rules, checked, workers) for difference in found]


def _values_differ(left: Views, right: Views, *sources: ModelSource) -> str:
    largest: float | None = None
    for ours, theirs in lightly(in_blocks(left, right), *sources):
        if ours.dtype != theirs.dtype:
            return f"{ours.dtype} and {theirs.dtype}".replace("torch.", "")
        if not bit_equal(ours, theirs):
            largest = max(largest or 0.0, (ours.double() - theirs.double()).abs().max().item())
    return "" if largest is None else f"values differ by up to {largest:.3g}"
