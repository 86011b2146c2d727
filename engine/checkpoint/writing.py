"""A model written file by file into a directory that appears when it is whole, and read back as proof.

The work is done in `.DST.part` next to the destination; a run that was cut off goes on with the files that are
not finished. Tensors pass through in blocks: while one is read and checked, the one before is hashed and written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from paralign.models.arch import DTYPE_NAMES
from paralign.models.errors import CheckpointError, ParalignError, WeightsError
from paralign.models.weights import Rule, Views, bit_equal, count_parameters, in_blocks

from ..files.whole_file import name_directory, write_whole
from .file_manifest import digest_directory
from .hf import Assets, copy_assets, parse_size
from .manifest import MANIFEST, Digest, write_manifest
from .rawfile import Behind, lightly, raw
from .source import ModelSource, open_unchecked
from .target import HFTarget, NativeTarget, Target
from .tensor_digest import digest
from .workers import Advance, ByteBar, over

Kind = Literal["hf", "native"]
TARGETS: dict[Kind, type[HFTarget] | type[NativeTarget]] = {"hf": HFTarget, "native": NativeTarget}
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
        progress: show a progress bar if there is a terminal.
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


class DiskFull(CheckpointError):
    """The disk filled while a model was written; what is there stays, to go on with."""


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
    about: Callable[[Path], Mapping[str, Any]],
) -> Report:
    """Writes the model of `source` to `dst`, with a manifest; what is read is checked by that of `source`.

    Args:
        dst: absent or empty.
        identity: what the bytes depend on besides `options`; a run that was cut off is gone on with only if
            it is the same.
        about: says what the manifest is to say of where the model comes from; called when all is written, with
            the directory, to which it may add.

    Raises:
        CheckpointError, WeightsError: `dst` is not empty, the disk is too small, a tensor is not finite, one is not
            what it was when `source` was written, or what was written is not what was read.
    """
    refuse_unless_empty(dst)
    shard_bytes = parse_size(options.max_shard_size)
    plan = {"kind": options.kind, "dtype": str(options.dtype), "shards": shard_bytes, **identity}
    with _unfinished(dst, plan) as part:
        target = TARGETS[options.kind](part, source.rules, dtype=options.dtype, max_shard_bytes=shard_bytes)
        job = _Job(source, target, options.dtype, digest_early=not options.verify)
        files = [file for file in target.files if not job.finished(file)]
        done = target.tensor_bytes - sum(map(target.file_bytes, files))
        _refuse_without_room(dst, target.tensor_bytes - done)
        with ByteBar(shown=options.progress) as bar:
            began = time.monotonic()
            advance = bar.task("writing", total=target.tensor_bytes, done=done)
            with _disk_may_fill(dst):
                job.write(files, options.workers, advance)
            target.finish()
            dtype = str(options.dtype).removeprefix("torch.")
            copy_assets(Assets(source.assets, source.assets), target.assets, dtype=dtype)
            wrote = time.monotonic()
            if options.verify:
                advance = bar.task("verifying", total=target.tensor_bytes)
                digests = job.verify(open_unchecked(part), options.workers, advance)
            else:
                digests = job.early_digests()
        passing = {MANIFEST, PLAN, *target.files, *map(job.note, target.files)}
        write_manifest(part, digest_directory(part, without=passing), digests, **about(part))
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
        if not (self._done(file).is_file() and (self._target.directory / file).is_file()):
            return False
        return bool(self._noted(file, "digests")) or not self._digest_early

    def write(self, files: list[str], workers: int, advance: Advance) -> None:
        def write_file(file: str) -> None:
            digests: dict[str, Any] = {}

            def tensors() -> Iterator[tuple[str, Views]]:
                for rule, names in self._target.content[file]:
                    sound = checker.submit(self._source.check, rule)
                    if self._target.kind == "hf":
                        read = self._source.tensors(rule)
                    else:
                        read = {rule.native: self._source.native(rule)}
                    for name in names:
                        yield name, self._passing(name, rule, read[name], sound, digests, advance)
                    self._source.release()

            facts = self._target.write(file, tensors())
            write_whole(self._done(file), json.dumps({"digests": digests, "facts": facts}))

        with ThreadPoolExecutor(workers) as checker:
            over(files, write_file, workers)
        self._target.facts = {file: self._noted(file, "facts") for file in self._target.files}

    def _passing(
        self,
        name: str,
        rule: Rule,
        parts: Views,
        sound: Future[None],
        digests: dict[str, Any],
        advance: Advance,
    ) -> Iterator[Tensor]:
        """A tensor's blocks, checked, cast, and hashed if it is early.

        Raises what `sound` does: meanwhile another thread finds whether the source is what it was.
        """
        behind, hasher = Behind(), hashlib.sha256()
        for (block,) in lightly(in_blocks(parts), self._source):
            cast = block.to(self._dtype)
            if fault := _not_finite(name, block, cast):
                sound.result()  # a broken source says so
                raise WeightsError(fault)
            block = cast
            if self._digest_early:
                behind.submit(hasher.update, raw(block))
            yield block
            advance(block.nbytes)
        if self._digest_early:
            behind.wait()
            dtype = str(self._dtype).removeprefix("torch.")
            digests[name] = asdict(Digest(list(rule.shapes[name]), dtype, hasher.hexdigest()))
        sound.result()

    def verify(self, written: ModelSource, workers: int, advance: Advance) -> dict[str, Digest]:
        """Every tensor read back, mapped to Hugging Face's names, compared with the source; digests as stored."""

        def check(i: int) -> dict[str, Digest]:
            rule = written.rules[i]
            stored = written.stored(rule)
            hashed = {
                name: hasher.submit(digest, rule.shapes[name], parts, written)
                for name, parts in stored.items()
            }
            original, back = self._source.tensors(self._source.rules[i]), written.tensors(rule)
            for name in rule.hf:
                pairs = in_blocks(original[name], back[name])
                for expected, found in lightly(pairs, self._source, written):
                    if not bit_equal(expected.to(self._dtype), found):
                        raise WeightsError(
                            f"{written.directory}: {name} was not read back as written; is the disk sound?"
                        )
            digests = {name: future.result() for name, future in hashed.items()}
            advance(written.nbytes(rule))
            written.release()
            self._source.release()
            return digests

        with ThreadPoolExecutor(workers) as hasher:
            found = over(range(len(written.rules)), check, workers)
        return {name: entry for digests in found for name, entry in digests.items()}

    def early_digests(self) -> dict[str, Digest]:
        return {
            name: Digest(**entry)
            for file in self._target.files
            for name, entry in self._noted(file, "digests").items()
        }

    def clean_up(self) -> None:
        for file in self._target.files:
            self._done(file).unlink()

    def note(self, file: str) -> str:
        """The name of the note that a file is finished."""
        return f"{file}.done.json"

    def _noted(self, file: str, what: str) -> Any:
        return json.loads(self._done(file).read_text())[what]

    def _done(self, file: str) -> Path:
        return self._target.directory / self.note(file)


def _not_finite(name: str, tensor: Tensor, cast: Tensor) -> str:
    """An error for NaN or Inf, else nothing; they come out of the extremes, in one pass and without a mask."""
    if all(torch.isfinite(extreme) for extreme in torch.aminmax(cast)):
        return ""
    largest = tensor.abs().max()
    if torch.isfinite(largest):
        dtype = str(cast.dtype).removeprefix("torch.")
        return f"{name}: holds {largest:g}, too large for {dtype}; choose another dtype"
    return f"{name}: holds NaN or Inf; the model was saved after it had diverged"


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
                write_whole(saved, json.dumps(plan))
            for cut_off in part.rglob("*.part"):
                cut_off.unlink()
            try:
                yield part
            except ParalignError as error:
                if not isinstance(error, DiskFull):
                    shutil.rmtree(part)
                raise
            saved.unlink()
            name_directory(part, dst)
        finally:
            part.with_suffix(".lock").unlink()


@contextmanager
def _disk_may_fill(dst: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull(
            f"{dst}: somebody else has filled the disk meanwhile; make room and start again with the same "
            "options: it goes on where it was"
        ) from None


def _refuse_without_room(dst: Path, needed: int) -> None:
    parent = next(path for path in dst.absolute().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise WeightsError(
            f"{dst}: {needed:,} bytes are needed and {free:,} are free in {parent}; make room or choose "
            "another disk"
        )
