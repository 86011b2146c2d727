"""Renders and tokenises files in worker processes. Owns the stream of samples, not its storage."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from paralign.models.errors import DataError

from .config import LossOn
from .conversation import RecordFormat, read_record
from .render import Renderer
from .sources import Record, decode, read_records

CHUNK_CHARS = 1 << 20  # a task of some tenths of a second


@dataclass(frozen=True)
class Rendering:
    """All that decides the tokens of a record, besides the record."""

    tokenizer_dir: Path
    template: str | None
    loss_on: LossOn

    def open(self) -> Renderer:
        """The renderer, which does not travel between processes."""
        return Renderer(self.tokenizer_dir, self.template, self.loss_on)


@dataclass(frozen=True)
class Chunk:
    """Some records of one file, in order."""

    path: Path
    source: int
    record_format: RecordFormat
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Encoded:
    """The samples of one chunk, end to end.

    Attributes:
        source: index of the file.
        tokens, learned: int32 and bool, one per token.
        lengths, lines: int64, one per sample.
        n_stops: samples that teach a stop token.
        n_bytes: of the file, covered by the chunk.
    """

    source: int
    tokens: np.ndarray
    learned: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    n_stops: int
    n_bytes: int


def encode_files(
    files: Sequence[Path], formats: Sequence[RecordFormat], rendering: Rendering, workers: int
) -> Iterator[Encoded]:
    """Every record of `files`, in order whatever the number of workers (0: one for each core).

    The first chunk is encoded here: a wrong template or a small file needs no process.

    Raises:
        DataError: a record that cannot be used; the workers are ended.
    """
    renderer = rendering.open()
    chunks = _chunks(files, formats)
    n_workers = workers or _cores()
    yield from (_encode(chunk, renderer) for chunk in islice(chunks, 1 if n_workers > 1 else None))
    yield from _in_processes(chunks, rendering, n_workers)


def _encode(chunk: Chunk, renderer: Renderer) -> Encoded:
    samples = []
    for record in chunk.records:
        place = f"{chunk.path}:{record.line}"
        samples.append(renderer(read_record(decode(record, chunk.path), chunk.record_format, place)))
    return Encoded(
        source=chunk.source,
        tokens=np.concatenate([sample.tokens for sample in samples]),
        learned=np.concatenate([sample.learned for sample in samples]),
        lengths=np.array([len(sample.tokens) for sample in samples], dtype=np.int64),
        lines=np.array([record.line for record in chunk.records], dtype=np.int64),
        n_stops=sum(map(renderer.learns_to_stop, samples)),
        n_bytes=sum(len(record.text.encode()) for record in chunk.records),
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # a cluster job may use fewer cores than the node has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encode_in_worker(chunk: Chunk, rendering: Rendering) -> Encoded:
    return _encode(chunk, _renderer_of_worker(rendering))


@lru_cache(maxsize=1)  # a worker lives for one build, so the tokenizer's files do not change under it
def _renderer_of_worker(rendering: Rendering) -> Renderer:
    return rendering.open()


def _in_processes(chunks: Iterable[Chunk], rendering: Rendering, n_workers: int) -> Iterator[Encoded]:
    pool = ProcessPoolExecutor(n_workers, mp_context=get_context("spawn"))  # starts none before a first chunk
    waiting: deque[Future[Encoded]] = deque()  # bounded: the parent reads far faster than workers tokenise
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk, rendering))
            if len(waiting) > 2 * n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenises was ended from outside, most often for want of memory; lower `workers`"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(files: Sequence[Path], formats: Sequence[RecordFormat]) -> Iterator[Chunk]:
    for source, (path, record_format) in enumerate(zip(files, formats, strict=True)):
        records: list[Record] = []
        n_chars = 0
        for record in read_records(path):
            records.append(record)
            n_chars += len(record.text)
            if n_chars >= CHUNK_CHARS:
                yield Chunk(path, source, record_format, tuple(records))
                records, n_chars = [], 0
        if records:
            yield Chunk(path, source, record_format, tuple(records))
