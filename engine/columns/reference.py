"""Log-probabilities of a reference model, computed once and kept next to the tokens.

    <cache of the data set>/reference-<weights>.npz            of every answer, good for any pack plan or layout
                            mismatched-<weights>-<steps>.npz   of mismatched answers, in the order of the steps

Each file says what it was made by: weights, data and template, and has a checksum. One that was made by others is
refused, one that is damaged is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from paralign.models.errors import DataError

from ..batch import PackedBatch
from ..checkpoint.hf import assets_of
from ..checkpoint.tensorfile import MappedFile, read_header
from ..data.loader import PackLoader
from ..data.token_files import samples_key
from ..files.array_file import read_arrays
from ..files.whole_file import whole_file
from ..parallel.mesh import Mesh
from .fillers import StoredReference

SAMPLE_BYTES = 1 << 12  # of each tensor, at its beginning, middle and end

Score = Callable[[Iterable[list[PackedBatch]], int], np.ndarray]  # this rank's packs by step, answers in all


class DamagedError(DataError):
    """A file that is not as it was written."""


@dataclass(frozen=True)
class MadeBy:
    """What decides the log-probability of an answer: digests of the weights, the data and the template."""

    weights: str
    data: str
    template: str


def weights_digest(directory: Path, *, dtype: str) -> str:
    """Names the weights in a directory, of either form, and the precision they are used in.

    It covers config.json, every header, and a sample of every tensor: an update by an optimizer moves all of a
    tensor, and reading 140 GB at each start would cost minutes.
    """
    digest = hashlib.sha256(dtype.encode())
    digest.update((assets_of(directory) / "config.json").read_bytes())
    for path in sorted(directory.glob("*.distcp")):
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in range(0, size, max(1, size // 64)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    for path in sorted(directory.glob("*.safetensors")):
        entries = read_header(path)
        mapped = MappedFile(path, entries)
        for name in sorted(entries):
            raw = mapped[name].contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {entries[name]}".encode())
            for start in (0, max(0, len(raw) // 2), max(0, len(raw) - SAMPLE_BYTES)):
                digest.update(raw[start : start + SAMPLE_BYTES].numpy().tobytes())
    return digest.hexdigest()[:32]


def read_or_score(
    loaders: Mapping[str, PackLoader], made_by: MadeBy, mesh: Mesh, score: Score, *, total_steps: int
) -> dict[str, StoredReference]:
    """For every loader the log-probabilities of its answers, and of its mismatched answers if it has any.

    Args:
        loaders: `train`, whose steps are `total_steps`, and validation sets, which are one epoch each.
        score: computes what is not on disk yet, collective over all ranks.

    Raises:
        DataError: a file that was made by other weights, data or template.
    """
    found: dict[str, StoredReference] = {}

    def score_all(loader: PackLoader) -> np.ndarray:
        return score(loader.every_answer(), loader.cache.n_all_answers)

    def score_mismatched(loader: PackLoader, n_steps: int) -> np.ndarray:
        return score(map(loader.mismatched, range(n_steps)), loader.answers_before(n_steps))

    for name, loader in loaders.items():
        directory = loader.cache.directory
        mine = MadeBy(made_by.weights, samples_key(directory), made_by.template)
        path = directory / f"reference-{mine.weights[:16]}.npz"
        values, mismatched = _stored(path, mine, mesh, partial(score_all, loader)), None
        if loader.needs_mismatched:
            n_steps = total_steps if name == "train" else loader.epochs.first_step(1)
            # Which answers are mismatched is part of the name: files of the rule before this one are other numbers.
            key = hashlib.sha256(f"{loader.fingerprint} {n_steps} by prompt".encode()).hexdigest()[:16]
            path = directory / f"mismatched-{mine.weights[:16]}-{key}.npz"
            mismatched = _stored(path, mine, mesh, partial(score_mismatched, loader, n_steps))
        on_device = [None if v is None else torch.from_numpy(v).to(mesh.device) for v in (values, mismatched)]
        found[name] = StoredReference(*on_device)
    return found


def read_reference(path: Path, mine: MadeBy) -> np.ndarray:
    """float64, by answer id.

    Raises:
        DamagedError: not such a file, or not as it was written.
        DataError: made by other weights, data or template; it says which.
    """
    try:
        made_by, values = read_arrays(path, "made_by", "values")
        theirs = json.loads(str(made_by))
        digest = theirs.get("sha256", hashlib.sha256(values.tobytes()).hexdigest())  # older files have none
        if values.dtype != np.float64 or digest != hashlib.sha256(values.tobytes()).hexdigest():
            raise ValueError("it holds other numbers than were written")
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(
            f"{path}: not a file of reference log-probabilities ({error}); delete it"
        ) from None
    other = [name for name, value in asdict(mine).items() if theirs.get(name) != value]
    if other:
        raise DataError(
            f"{path}: reference log-probabilities made by other {' and '.join(other)} than this run's; delete it, "
            "and they are computed anew"
        )
    return values


def write_reference(path: Path, mine: MadeBy, values: np.ndarray) -> None:
    """Keeps float64 values, by answer id; see `read_reference`."""
    about = {**asdict(mine), "sha256": hashlib.sha256(values.tobytes()).hexdigest()}
    with whole_file(path) as file:
        np.savez(file, values=values, made_by=np.array(json.dumps(about)))


def _stored(path: Path, mine: MadeBy, mesh: Mesh, compute: Callable[[], np.ndarray]) -> np.ndarray:
    values = None
    if _all_ranks(path.is_file(), mesh):  # a file system may show it to some ranks first
        try:
            values = read_reference(path, mine)
        except DamagedError as error:
            if mesh.is_main:
                print(f"{str(error).removesuffix('; delete it')}; computed anew", file=sys.stderr)
        if _all_ranks(values is not None, mesh):
            assert values is not None
            return values
    values = compute()
    if mesh.is_main:
        write_reference(path, mine, values)
    mesh.barrier()
    return values


def _all_ranks(is_so: bool, mesh: Mesh) -> bool:
    agreed = torch.tensor(int(is_so), device=mesh.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed.item())
