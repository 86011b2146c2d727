"""manifest.json: name, shape, dtype and SHA-256 of every tensor of a model on disk, and checks by it.

The digests are of the tensors' bytes, little-endian and contiguous, so that they do not depend on shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paralign.models.errors import WeightsError
from paralign.models.weights import Rule, Views, bit_equal, in_blocks

from ..files.whole_file import write_whole
from .rawfile import raw
from .source import ModelSource, open_source
from .workers import ByteBar, over

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Digest:
    """One tensor: shape, dtype (`bfloat16`), SHA-256 in hexadecimal."""

    shape: list[int]
    dtype: str
    sha256: str


def digest(shape: Sequence[int], parts: Views) -> Digest:
    """The digest of a tensor of `shape` on the CPU."""
    hasher = hashlib.sha256()
    name = ""
    for part in parts:
        hasher.update(raw(part))
        name = str(part.dtype).removeprefix("torch.")
    return Digest(list(shape), name, hasher.hexdigest())


def fingerprint(digests: Mapping[str, Digest]) -> str:
    """One hash for a whole model, whatever the order of its tensors."""
    text = json.dumps({name: asdict(digests[name]) for name in sorted(digests)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(directory: Path, digests: Mapping[str, Digest], **about: Any) -> None:
    """Writes `manifest.json`; `about` says where the weights come from."""
    content = {
        "format": 1,
        **about,
        "fingerprint": fingerprint(digests),
        "tensors": {name: asdict(entry) for name, entry in digests.items()},
    }
    write_whole(directory / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_manifest(directory: Path) -> dict[str, Digest]:
    """Raises WeightsError where there is none, or none that can be read."""
    path = directory / MANIFEST
    try:
        tensors = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        return {name: Digest(**entry) for name, entry in tensors.items()}
    except FileNotFoundError:
        raise WeightsError(
            f"{path}: there is no such file; `paralign convert` writes one, or give a second directory"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: not a manifest ({error}); write it again with `paralign convert`"
        ) from None


@dataclass(frozen=True)
class Difference:
    """A tensor that is not as it should be, and in what."""

    name: str
    what: str


def check_against_manifest(directory: Path, *, workers: int = 1) -> list[Difference]:
    """Reads every tensor of a model and compares it with the manifest next to it.

    Raises:
        WeightsError, CheckpointError: the directory cannot be read at all.
    """
    expected = read_manifest(directory)
    source = open_source(directory)

    def check(rule: Rule) -> list[Difference]:
        found = []
        for name, parts in source.stored(rule).items():
            if name not in expected:
                found.append(Difference(name, "not in the manifest"))
            elif words := _digests_differ(expected[name], digest(rule.shapes[name], parts)):
                found.append(Difference(name, words))
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
    ours, theirs = open_source(left), open_source(right)
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
            elif words := _values_differ(parts, others[name]):
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


def _digests_differ(expected: Digest, found: Digest) -> str:
    if expected.shape != found.shape:
        return f"shape {found.shape}, expected {expected.shape}"
    if expected.dtype != found.dtype:
        return f"{found.dtype}, expected {expected.dtype}"
    return "" if expected.sha256 == found.sha256 else "other values"


def _values_differ(left: Views, right: Views) -> str:
    largest: float | None = None
    for ours, theirs in in_blocks(left, right):
        if ours.dtype != theirs.dtype:
            return f"{ours.dtype} and {theirs.dtype}".replace("torch.", "")
        if not bit_equal(ours, theirs):
            largest = max(largest or 0.0, (ours.double() - theirs.double()).abs().max().item())
    return "" if largest is None else f"values differ by up to {largest:.3g}"
