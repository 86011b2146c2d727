"""A model written file by file into a directory that appears when it is whole. Owns work, resuming, proof.

The work is done in `.DST.part` beside the destination; a run that was cut off goes on with the files that are
not finished. Each worker holds one rule's tensors at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor

from paralign.models.arch import DTYPE_NAMES
from paralign.models.errors import WeightsError
from paralign.models.weights import bit_equal, count_parameters

from .checkpoint.hf import Assets, copy_assets, parse_size
from .checkpoint.manifest import Digest, digest
from .checkpoint.source import ModelSource, open_source
from .checkpoint.target import HFTarget, NativeTarget, Target

Kind = Literal["hf", "native"]
PLAN = "plan.json"


@dataclass(frozen=True)
class WriteOptions:
    """How a model is written.

    Attributes:
        kind: `hf` or `native`.
        dtype: float32, bfloat16 or float16.
        max_shard_size: of a file, such as `5GB`; a larger tensor has a file of its own.
        verify: read everything back, map it back and compare.
        workers: files written, and tensors verified, at the same time; memory grows with them.
        progress: show a progress bar.
    """

    kind: Kind
    dtype: torch.dtype
    max_shard_size: str = "5GB"
    verify: bool = True
    workers: int = 1
    progress: bool = True


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        kind: `hf` or `native`.
        tensors, parameters, files: tensors as stored, their elements, files of weights.
        resumed: files that an earlier run had finished.
        tensor_bytes: bytes of the tensors.
        write_seconds, verify_seconds: wall time of each pass.
        verified: every tensor was read back, mapped back and compared, bit by bit.
    """

    kind: Kind
    tensors: int
    parameters: int
    files: int
    resumed: int
    tensor_bytes: int
    write_seconds: float
    verify_seconds: float
    verified: bool


def refuse_unless_empty(dst: Path) -> None:
    """Raises WeightsError unless `dst` is absent or empty."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise WeightsError(f"{dst}: not empty; choose a directory that is empty or not there")


def dtype_named(name: str) -> torch.dtype:
    """Raises WeightsError for a dtype that weights are not kept in."""
    if name not in DTYPE_NAMES:
        raise WeightsError(f"dtype: read {name!r}; expected one of {', '.join(DTYPE_NAMES)}")
    return getattr(torch, name)


def write_model(
    source: ModelSource,
    dst: Path,
    options: WriteOptions,
    *,
    identity: Mapping[str, Any],
    finish: Callable[[Path, dict[str, Digest]], None],
) -> Report:
    """Writes the model of `source` to `dst`.

    Args:
        dst: absent or empty.
        identity: what the bytes depend on besides `options`; a run that was cut off is gone on with only if
            it is the same.
        finish: writes what else belongs into the directory, given its path and the digests of its tensors.

    Raises:
        CheckpointError, WeightsError: `dst` is not empty, the disk is too small, a tensor is not finite, or
            what was written is not what was read.
    """
    refuse_unless_empty(dst)
    shard_bytes = parse_size(options.max_shard_size)
    plan = {"kind": options.kind, "dtype": str(options.dtype), "shards": shard_bytes, **identity}
    with _unfinished(dst, plan) as part:
        make: type[HFTarget] | type[NativeTarget] = HFTarget if options.kind == "hf" else NativeTarget
        target = make(part, source.rules, dtype=options.dtype, max_shard_bytes=shard_bytes)
        job = _Job(source, target, options.dtype, digest_early=not options.verify)
        files = [file for file in target.files if not job.finished(file)]
        done = target.tensor_bytes - sum(map(target.file_bytes, files))
        _refuse_without_room(dst, target.tensor_bytes - done)
        with _bar(options.progress) as bar:
            began = time.monotonic()
            writing = bar.add_task("writing", total=target.tensor_bytes, completed=done)
            job.write(files, options.workers, _advance(bar, writing))
            target.finish()
            dtype = str(options.dtype).removeprefix("torch.")
            copy_assets(Assets(source.assets, source.assets), target.assets, dtype=dtype)
            wrote = time.monotonic()
            if options.verify:
                verifying = bar.add_task("verifying", total=target.tensor_bytes)
                digests = job.verify(open_source(part), options.workers, _advance(bar, verifying))
            else:
                digests = job.early_digests()
        finish(part, digests)
        job.clean_up()
    return Report(
        kind=options.kind,
        tensors=len(digests),
        parameters=count_parameters(source.rules),
        files=len(target.files),
        resumed=len(target.files) - len(files),
        tensor_bytes=target.tensor_bytes,
        write_seconds=wrote - began,
        verify_seconds=time.monotonic() - wrote,
        verified=options.verify,
    )


class _Job:
    """Files of one target written from one source; `FILE.done.json` says that a file is finished."""

    def __init__(
        self, source: ModelSource, target: Target, dtype: torch.dtype, *, digest_early: bool
    ) -> None:
        self._source, self._target, self._dtype = source, target, dtype
        self._digest_early = digest_early

    def finished(self, file: str) -> bool:
        if not self._done(file).is_file():
            return False
        if self._digest_early and not json.loads(self._done(file).read_text())["digests"]:
            return False
        return self._target.directory.joinpath(file).is_file()

    def write(self, files: list[str], workers: int, advance: Callable[[int], None]) -> None:
        def write_file(file: str) -> None:
            digests: dict[str, Any] = {}

            def tensors() -> Iterator[tuple[str, Tensor]]:
                for rule, names in self._target.content(file):
                    read = self._source.tensors(rule) if self._target.kind == "hf" else None
                    for name in names:
                        tensor = read[name] if read is not None else self._source.native(rule)
                        refuse_unless_finite(name, tensor)
                        tensor = tensor.to(self._dtype)
                        if self._digest_early:
                            digests[name] = asdict(digest(tensor))
                        yield name, tensor
                        advance(tensor.nbytes)
                        del tensor
                    del read
                    self._source.release()

            facts = self._target.write(file, tensors())
            _write_whole(self._done(file), json.dumps({"digests": digests, "facts": facts}))

        with ThreadPoolExecutor(workers) as pool:
            try:
                for _ in pool.map(write_file, files):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self._target.facts = {
            file: json.loads(self._done(file).read_text())["facts"] for file in self._target.files
        }

    def verify(self, written: ModelSource, workers: int, advance: Callable[[int], None]) -> dict[str, Digest]:
        """Every tensor read back, mapped to Hugging Face's names, compared with the source; digests as stored."""

        def check(i: int) -> dict[str, Digest]:
            stored = written.stored(written.rules[i])
            back = stored if written.kind == "hf" else written.rules[i].join(list(stored.values()))
            original = self._source.tensors(self._source.rules[i])
            for name, tensor in back.items():
                if not bit_equal(original[name].to(self._dtype), tensor):
                    raise WeightsError(
                        f"{written.directory}: {name} was not read back as written; is the disk sound?"
                    )
            digests = {name: digest(tensor) for name, tensor in stored.items()}
            advance(sum(tensor.nbytes for tensor in stored.values()))
            del stored, back, original
            written.release()
            self._source.release()
            return digests

        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(check, range(len(written.rules))))
        return {name: entry for digests in found for name, entry in digests.items()}

    def early_digests(self) -> dict[str, Digest]:
        return {
            name: Digest(**entry)
            for file in self._target.files
            for name, entry in json.loads(self._done(file).read_text())["digests"].items()
        }

    def clean_up(self) -> None:
        for file in self._target.files:
            self._done(file).unlink()

    def _done(self, file: str) -> Path:
        return self._target.directory / f"{file}.done.json"


def refuse_unless_finite(name: str, tensor: Tensor) -> None:
    """Raises WeightsError for NaN or Inf; they come out of the extremes, in one pass and without a mask."""
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise WeightsError(f"{name}: holds NaN or Inf; the model was saved after it had diverged")


@contextmanager
def _unfinished(dst: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The directory to work in, an earlier one if it was for the same plan; renamed to `dst` at the end.

    What was cut off by anything but an error of the input stays, to go on with.

    Raises:
        WeightsError: somebody else is at it.
    """
    part = dst.with_name(f".{dst.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    with part.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WeightsError(f"{dst}: another conversion is writing it; wait for it to end") from None
        try:
            saved = part / PLAN
            if not saved.is_file() or json.loads(saved.read_text()) != plan:
                shutil.rmtree(part)
                part.mkdir()
                _write_whole(saved, json.dumps(plan))
            try:
                yield part
            except WeightsError:
                shutil.rmtree(part)
                raise
            saved.unlink()
            os.replace(part, dst)
        finally:
            part.with_suffix(".lock").unlink()


def _refuse_without_room(dst: Path, needed: int) -> None:
    parent = next(path for path in dst.absolute().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise WeightsError(
            f"{dst}: {needed:,} bytes are needed and {free:,} are free in {parent}; make room or choose "
            "another disk"
        )


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )


def _advance(bar: Progress, task: TaskID) -> Callable[[int], None]:
    return lambda count: bar.advance(task, count)
