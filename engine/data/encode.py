"""Renders and tokenises sources in worker processes: a stream of samples, in order."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

import numpy as np

from paralign.models.errors import DataError

from ..batch import Kind
from .config import LossOn, SourceConfig
from .conversation import read_record, rename
from .hashed_file import Digests
from .preference import Preference, read_preference
from .render import Rendered, Renderer
from .sources import Reading, decode, read_records
from .tables import Record

CHUNK_BYTES = 1 << 20  # a task of some tenths of a second
ANSWER = np.dtype(  # what is known of an answer besides its tokens
    [
        ("prompt", "i8"),  # tokens before the answer, the same in all answers of a record
        ("prompt_key", "u8"),  # equal for equal prompts
        ("rank", "i4"),  # place in its record: 0 chosen, 1 rejected
        ("desirable", "?"),
        ("score", "f8"),  # NaN: none
        ("margin", "f8"),
    ]
)


@dataclass(frozen=True)
class Rendering:
    """All that decides the tokens of a record, besides the record and its source.

    Attributes:
        now: the date that a chat template writes, if it writes one; None is today.
        skip_bad: leave out records that cannot be read or rendered, and count them.
    """

    tokenizer_dir: Path
    template: str | None
    loss_on: LossOn
    skip_bad: bool = False
    now: datetime | None = None

    def open(self) -> Renderer:
        """The renderer, which does not travel between processes."""
        return Renderer(self.tokenizer_dir, self.template, self.loss_on, self.now)


@dataclass(frozen=True)
class Chunk:
    """Some records of one source, in order; `index` is the source's among all."""

    source: SourceConfig
    index: int
    reading: Reading
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Encoded:
    """The samples of one chunk, end to end.

    Attributes:
        source: index of the source.
        tokens, weights: int32 and float32, one per token: its id, and what it counts in the loss.
        lengths, lines: int64, one per sample.
        n_stops: samples that teach a stop token.
        n_bytes: of the source, covered by the chunk.
        bad: what was wrong with each record that was left out.
        answers: of ANSWER, one per sample where samples are answers, else empty.
        n_remade: samples that older versions refused or made otherwise, see `Renderer.n_remade`.
    """

    source: int
    tokens: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    n_stops: int
    n_bytes: int
    bad: tuple[str, ...]
    answers: np.ndarray
    n_remade: int


def encode_sources(
    sources: Sequence[SourceConfig],
    readings: Sequence[Reading],
    rendering: Rendering,
    workers: int,
    digests: Digests | None = None,
) -> Iterator[Encoded]:
    """Every record of `sources`, in order whatever the number of workers (0: one for each core).

    The first chunk is encoded here: a wrong template or a small file needs no process.

    Args:
        readings: how each source's records are read.
        digests: what the files of the sources hold, if that is to be compared with what is read.

    Raises:
        DataError: a record that cannot be used, unless those are left out; files that are not what `digests` says.
            The workers are ended.
    """
    renderer = rendering.open()
    chunks = _chunks(sources, readings, digests)
    n_workers = workers or _cores()
    first = islice(chunks, 1 if n_workers > 1 else None)
    yield from (_encode(chunk, renderer, rendering) for chunk in first)
    yield from _in_processes(chunks, rendering, n_workers)


def encode_record(
    record: Record, source: SourceConfig, reading: Reading, renderer: Renderer
) -> tuple[list[Rendered], np.ndarray]:
    """The samples of one record: its conversation, as one or several, or its answers, each behind its prompt.

    Returns:
        The samples, and of ANSWER what is known of each answer: no row for a conversation.
    """
    place = f"{source.path}:{record.line}"
    try:
        value = rename(decode(record, source.path), source.columns)
        if not isinstance(reading, Kind):
            return renderer.samples(read_record(value, reading, place)), np.zeros(0, dtype=ANSWER)
        preference = read_preference(value, reading, place)
        samples = [renderer(conversation) for conversation in preference.conversations]
        return samples, describe_answers(preference, samples)
    except RecursionError:
        raise DataError(f"{place}: nested too deeply; mend the record") from None


def describe_answers(preference: Preference, samples: Sequence[Rendered]) -> np.ndarray:
    """Of ANSWER, one row for each answer of a record.

    The prompt is what all answers have in common before the first token that any of them learns: a tokenizer
    may merge the end of a prompt with the beginning of one answer and not of the other.

    Args:
        samples: the prompt with each answer, rendered.

    Raises:
        DataError: an answer without a learned token, or nothing before it.
    """
    place = preference.conversations[0].place
    n_prompt = min(len(sample.tokens) for sample in samples)
    for sample in samples:
        learned = np.flatnonzero(sample.learned)
        if not len(learned):
            raise DataError(f"{place}: an answer that renders to no token; expected text; remove the record")
        n_prompt = min(n_prompt, int(learned[0]))
        common = sample.tokens[:n_prompt] == samples[0].tokens[:n_prompt]
        n_prompt = n_prompt if common.all() else int(np.argmin(common))
    if n_prompt == 0:
        raise DataError(
            f"{place}: no token stands before the answers; take a chat template that marks turns, or begin "
            "with a token of the beginning"
        )
    key = hashlib.blake2b(samples[0].tokens[:n_prompt].tobytes(), digest_size=8).digest()
    rows = np.zeros(len(samples), dtype=ANSWER)
    rows["prompt"] = n_prompt
    rows["prompt_key"] = int.from_bytes(key, "big")
    rows["rank"] = np.arange(len(samples))
    rows["desirable"] = preference.desirable
    rows["score"] = preference.scores
    rows["margin"] = preference.margin
    return rows


def _encode(chunk: Chunk, renderer: Renderer, rendering: Rendering) -> Encoded:
    samples: list[Rendered] = []
    lines, bad, answers = [], [], [np.zeros(0, dtype=ANSWER)]
    n_remade = renderer.n_remade
    for record in chunk.records:
        try:
            found, about = encode_record(record, chunk.source, chunk.reading, renderer)
        except DataError as error:
            if not rendering.skip_bad:
                raise
            bad.append(str(error))
        else:
            samples += found
            answers.append(about)
            lines += [record.line] * len(found)
    nothing = [np.zeros(0, dtype=np.int32)]
    return Encoded(
        source=chunk.index,
        tokens=np.concatenate([sample.tokens for sample in samples] or nothing),
        weights=np.concatenate([sample.learned for sample in samples] or nothing).astype(np.float32),
        lengths=np.array([len(sample.tokens) for sample in samples], dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        n_stops=sum(map(renderer.learns_to_stop, samples)),
        n_bytes=sum(record.n_bytes for record in chunk.records),
        bad=tuple(bad),
        answers=np.concatenate(answers),
        n_remade=renderer.n_remade - n_remade,
    )


def _end_with_parent() -> None:
    """Worker: a parent that is killed cannot end it, and it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, name="parent watch", daemon=True).start()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # a cluster job may use fewer cores than the node has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encode_in_worker(chunk: Chunk, rendering: Rendering) -> Encoded:
    return _encode(chunk, _renderer_of_worker(rendering), rendering)


@lru_cache(maxsize=1)  # a worker lives for one build, so the tokenizer's files do not change under it
def _renderer_of_worker(rendering: Rendering) -> Renderer:
    return rendering.open()


def _in_processes(chunks: Iterable[Chunk], rendering: Rendering, n_workers: int) -> Iterator[Encoded]:
    # Workers are forked from a fresh process that has imported all this once: neither an import for each worker,
    # which costs seconds, nor a fork of this process, which may have threads of gloo or NCCL. None starts before
    # a first chunk.
    context, others = get_context("forkserver"), set(active_children())
    context.set_forkserver_preload([__name__, "transformers.models.auto.tokenization_auto"])
    pool = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_end_with_parent)
    waiting: deque[Future[Encoded]] = deque()  # bounded: the parent reads far faster than workers tokenise
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk, rendering))
            if len(waiting) > 2 * n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        # By SIGKILL: the pool tries SIGTERM, which they do not hear (stop.py), and would wait for ever.
        for worker in set(active_children()) - others:
            worker.kill()
        raise DataError(
            "a process that tokenises was ended from outside, most often for want of memory; lower `workers`"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(
    sources: Sequence[SourceConfig], readings: Sequence[Reading], digests: Digests | None
) -> Iterator[Chunk]:
    for index, (source, reading) in enumerate(zip(sources, readings, strict=True)):
        records: list[Record] = []
        n_bytes = 0
        for record in read_records(source.path, digests):
            records.append(record)
            n_bytes += record.n_bytes
            if n_bytes >= CHUNK_BYTES:
                yield Chunk(source, index, reading, tuple(records))
                records, n_bytes = [], 0
        if records:
            yield Chunk(source, index, reading, tuple(records))
