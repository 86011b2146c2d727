"""manifest.json: name, shape, dtype and SHA-256 of every tensor of a model on disk. Owns checking by it.

The digests are of the tensors' bytes, little-endian and contiguous, so that they do not depend on shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paralign.models.errors import WeightsError
from paralign.models.weights import Rule, bit_equal

from .source import ModelSource, open_source

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Digest:
    """One tensor: shape, dtype (`bfloat16`), SHA-256 in hexadecimal."""

    shape: list[int]
    dtype: str
    sha256: str


def digest(tensor: Tensor) -> Digest:
    """Shape, dtype and hash of a tensor on the CPU."""
    raw = memoryview(tensor.detach().contiguous().view(torch.uint8).numpy()).cast("B")
    name = str(tensor.dtype).removeprefix("torch.")
    return Digest(list(tensor.shape), name, hashlib.sha256(raw).hexdigest())


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
    temporary = directory / f"{MANIFEST}.part"
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, directory / MANIFEST)


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


def check_against_manifest(
    directory: Path, *, workers: int = 1, advance: Callable[[int], None] = lambda n: None
) -> list[Difference]:
    """Reads every tensor of a model and compares it with the manifest beside it.

    Args:
        advance: told the bytes of each rule that is done.

    Raises:
        WeightsError, CheckpointError: the directory cannot be read at all.
    """
    expected = read_manifest(directory)
    source = open_source(directory)

    def check(rule: Rule) -> list[Difference]:
        found = []
        for name, tensor in source.stored(rule).items():
            if name not in expected:
                found.append(Difference(name, "not in the manifest"))
            elif words := _digests_differ(expected[name], digest(tensor)):
                found.append(Difference(name, words))
            advance(tensor.nbytes)
        source.release()
        return found

    differences = _over_rules(check, source.rules, workers)
    held = {name for rule in source.rules for name in (rule.hf if source.kind == "hf" else (rule.native,))}
    return differences + [Difference(name, "missing") for name in expected if name not in held]


def compare(
    left: Path, right: Path, *, workers: int = 1, advance: Callable[[int], None] = lambda n: None
) -> list[Difference]:
    """Compares two models bit by bit under their Hugging Face names; each may be of either kind.

    Raises:
        WeightsError, CheckpointError: a directory cannot be read at all.
    """
    ours, theirs = open_source(left), open_source(right)
    rules_there = {rule.native: rule for rule in theirs.rules}

    def check(rule: Rule) -> list[Difference]:
        if rule.native not in rules_there:
            return [Difference(name, f"only in {left}") for name in rule.hf]
        others = theirs.tensors(rules_there[rule.native])
        found = []
        for name, tensor in ours.tensors(rule).items():
            if name not in others:
                found.append(Difference(name, f"only in {left}"))
            elif words := _tensors_differ(tensor, others[name]):
                found.append(Difference(name, words))
            advance(tensor.nbytes)
        ours.release()
        theirs.release()
        return found

    differences = _over_rules(check, ours.rules, workers)
    here = {name for rule in ours.rules for name in rule.hf}
    return differences + [
        Difference(name, f"only in {right}") for rule in theirs.rules for name in rule.hf if name not in here
    ]


def tensor_bytes(source: ModelSource) -> int:
    """Bytes of a source's tensors; of padding and optimizer none."""
    return source.dtype().itemsize * sum(math.prod(rule.native_shape) for rule in source.rules)


def _over_rules(
    check: Callable[[Rule], list[Difference]], rules: tuple[Rule, ...], workers: int
) -> list[Difference]:
    with ThreadPoolExecutor(workers) as pool:
        return [difference for found in pool.map(check, rules) for difference in found]


def _digests_differ(expected: Digest, found: Digest) -> str:
    if expected.shape != found.shape:
        return f"shape {found.shape}, expected {expected.shape}"
    if expected.dtype != found.dtype:
        return f"{found.dtype}, expected {expected.dtype}"
    return "" if expected.sha256 == found.sha256 else "other values"


def _tensors_differ(left: Tensor, right: Tensor) -> str:
    if left.shape != right.shape:
        return f"shape {list(left.shape)} and {list(right.shape)}"
    if left.dtype != right.dtype:
        return f"{left.dtype} and {right.dtype}".replace("torch.", "")
    if bit_equal(left, right):
        return ""
    return f"values differ by up to {(left.double() - right.double()).abs().max().item():.3g}"
