"""Tokens on disk, made once for each content. Owns the directory and its key, not how tokens come about.

    <cache_dir>/<key>/tokens.bin    int32, all samples end to end
                      learned.bin   uint8, 1 where the token is to be predicted
                      samples.npz   per sample: lengths, n_loss, lines, sources
                      answers.npy   only of preferences: per sample a row of ANSWER
                      meta.json     n_tokens, max_token, paths; per source n_bad; first_bad

It is written under a temporary name and renamed, so that a directory of the final name is complete; of two
processes that write the same one, the first to end wins. N samples.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paralign.models.errors import DataError

from ..array_file import read_arrays
from ..whole_file import sync, sync_tree
from .config import DataConfig, SourceConfig
from .encode import Encoded, Rendering, encode_sources
from .preference import Kind
from .render import template_text
from .sources import content_files, record_format

SAMPLES = "samples.npz"
SAMPLE_COLUMNS = ("lengths", "n_loss", "lines", "sources")
VERSION = 2  # of the layout above and of what render makes of a conversation; part of the key
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class TokenCache:
    """The samples to train on: those on disk, less what `too_long` and `nothing_to_learn` take out.

    Opened by `TokenCache.open`; memory-mapped, and pickled as the way to open it again.

    Attributes:
        directory, origins, config: what it was opened with; `origins` are the sources of this set.
        fingerprint: names content, selection and weights; equal fingerprints have equal samples under equal
            ids, and equal epochs.
        tokens: int32, memory-mapped, the samples of the cache end to end.
        learned: uint8, memory-mapped, 1 where the token is to be predicted.
        starts: int64 (N,), first token of each sample.
        lengths: int64 (N,), tokens of each sample, at most `tokens_per_pack`.
        n_loss: int64 (N,), tokens to be predicted in each sample.
        sources: int32 (N,), index into `origins`.
        lines: int64 (N,), the line each sample begins at; of a table, its row.
        max_token: largest token id of the cache; the model's vocabulary must be larger.
        n_dropped, n_truncated, n_skipped: samples too long (dropped, cut) and with nothing to learn.
        n_bad: for each source, the records that could not be read or rendered and were left out.
        first_bad: what was wrong with the first of them; empty if there is none.
    """

    directory: Path
    origins: tuple[SourceConfig, ...]
    config: DataConfig
    fingerprint: str
    tokens: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    n_loss: np.ndarray
    sources: np.ndarray
    lines: np.ndarray
    max_token: int
    n_dropped: int
    n_truncated: int
    n_skipped: int
    n_bad: tuple[int, ...]
    first_bad: str

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Callable[..., TokenCache], tuple[object, ...]]:
        return TokenCache.open, (self.directory, self.origins, self.config)

    def sample(self, id_: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens int32 (L,) and learned uint8 (L,) of one sample, as views of the file."""
        rows = slice(self.starts[id_], self.starts[id_] + self.lengths[id_])
        return self.tokens[rows], self.learned[rows]

    def place(self, id_: int) -> str:
        """file:line of one sample."""
        return f"{self.origins[self.sources[id_]].path}:{self.lines[id_]}"

    @classmethod
    def open(cls, directory: Path, origins: Sequence[SourceConfig], config: DataConfig) -> TokenCache:
        """Maps the cache in `directory` and selects the samples that `config` lets through.

        Raises:
            DataError: not a whole cache; a sample too long or with nothing to learn, where that is an error;
                no sample left of a source that is to be seen.
        """
        try:
            meta = json.loads((directory / "meta.json").read_text())
            n_tokens, _ = meta["n_tokens"], (meta["n_bad"], meta["first_bad"], meta["max_token"])
            lengths, n_loss, lines, sources = read_arrays(directory / SAMPLES, *SAMPLE_COLUMNS)
            tokens = np.memmap(directory / "tokens.bin", dtype=np.int32, mode="r")
            learned = np.memmap(directory / "learned.bin", dtype=np.uint8, mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{directory}: not a cache of tokens ({error}); delete it") from None
        if not len(tokens) == len(learned) == n_tokens == lengths.sum():
            raise DataError(f"{directory}: tokens are missing; the disk may be full; delete it")
        starts = np.cumsum(lengths) - lengths

        def first(which: np.ndarray) -> str:
            i = int(np.flatnonzero(which)[0])
            return f"{origins[sources[i]].path}:{lines[i]}: {lengths[i]:,} tokens"

        limit = config.tokens_per_pack
        long = lengths > limit
        if long.any() and config.too_long == "error":
            raise DataError(
                f"{first(long)}; tokens_per_pack is {limit:,} and {_samples(long)} longer; "
                "raise tokens_per_pack, or set too_long: drop or truncate"
            )
        if config.too_long == "truncate":
            for i in np.flatnonzero(long):
                n_loss[i] = int(learned[starts[i] : starts[i] + limit].sum())
            keep = np.ones(len(lengths), dtype=bool)
        else:
            keep = ~long
        lengths = np.minimum(lengths, limit)
        barren = keep & (n_loss == 0)
        if barren.any() and config.nothing_to_learn == "error":
            raise DataError(
                f"{first(barren)}, none of them to be learned (no assistant turn, or it was cut off), like "
                f"{_count(barren):,} in all; mend them, or set nothing_to_learn: skip"
            )
        n_truncated = _count(keep & long)
        n_dropped = _count(~keep)
        keep &= ~barren
        for index, origin in enumerate(origins):
            here = sources == index
            if origin.weight and not (keep & here).any():
                raise DataError(
                    f"{origin.path}: no sample is left: {_count(here & long)} longer than {limit:,} tokens, "
                    f"{_count(here & barren)} with nothing to learn, {meta['n_bad'][index]:,} that cannot be read"
                    + (f", the first of all: {meta['first_bad']}" if meta["first_bad"] else "")
                )
        weights = [origin.weight for origin in origins]
        selection = f"{directory.name} {limit} {config.too_long} {config.nothing_to_learn} {weights}"
        return cls(
            directory=directory,
            origins=tuple(origins),
            config=config,
            fingerprint=hashlib.sha256(selection.encode()).hexdigest()[:32],
            tokens=tokens,
            learned=learned,
            starts=starts[keep],
            lengths=lengths[keep],
            n_loss=n_loss[keep],
            sources=sources[keep],
            lines=lines[keep],
            max_token=meta["max_token"],
            n_dropped=n_dropped,
            n_truncated=n_truncated,
            n_skipped=_count(barren),
            n_bad=tuple(meta["n_bad"]),
            first_bad=meta["first_bad"],
        )


def stop_token(cache: TokenCache, *, n_samples: int = 1000) -> int | None:
    """The id that ends most answers of the first samples; None where whole texts are learned, not answers."""
    if cache.config.loss_on == "all":
        return None
    ends: Counter[int] = Counter()
    for i in range(min(n_samples, len(cache))):
        tokens, learned = cache.sample(i)
        ends[int(tokens[np.flatnonzero(learned)[-1]])] += 1
    (token, count), *_ = ends.most_common(1)
    return token if 2 * count > ends.total() else None


def build_or_open(
    config: DataConfig, sources: Sequence[SourceConfig], tokenizer_dir: Path, *, progress: bool
) -> TokenCache:
    """The cache of `sources`, tokenised now if it is not there yet.

    Args:
        sources: of one training set or one validation set, see `DataConfig.sets`.
        tokenizer_dir: a Hugging Face directory with a fast tokenizer.
        progress: show a bar while tokenising.

    Raises:
        DataError, WeightsError: what is wrong with which line, template or tokenizer.
    """
    return TokenCache.open(
        *build(config, sources, tokenizer_dir, Kind.CONVERSATIONS, progress=progress), config
    )


def build(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    tokenizer_dir: Path,
    kind: Kind,
    *,
    progress: bool,
) -> tuple[Path, list[SourceConfig]]:
    """The directory of the cache, made now if it is not there yet, and the sources it was made of.

    Args:
        kind: what records are read as.
    """
    sources = [source.model_copy(update={"format": source.format or config.format}) for source in sources]
    directory = cache_directory(config, sources, tokenizer_dir, kind)
    if not directory.is_dir():
        _build(directory, config, sources, tokenizer_dir, kind, progress)
    return directory, sources


def cache_directory(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    tokenizer_dir: Path,
    kind: Kind = Kind.CONVERSATIONS,
) -> Path:
    """Where the cache of this content is, or will be: a process that waits for another one looks here."""
    key = hashlib.sha256()

    def add(name: str, content: bytes) -> None:
        key.update(f"{name} {len(content)}\n".encode() + content)

    add("version", str(VERSION).encode())
    add("loss_on", config.loss_on.encode())
    add("bad_record", config.bad_record.encode())
    add("kind", kind.value.encode())
    add("template", (template_text(config.chat_template) or "").encode())
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            add(name, _digest(tokenizer_dir / name))
    for source in sources:
        add("format", (source.format or config.format).encode())
        add("columns", json.dumps(source.columns, sort_keys=True).encode())
        for file in content_files(source.path):
            add("content", _digest(file))
    return config.cache_dir / key.hexdigest()[:32]


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _build(
    directory: Path,
    config: DataConfig,
    sources: Sequence[SourceConfig],
    tokenizer_dir: Path,
    kind: Kind,
    progress: bool,
) -> None:
    rendering = Rendering(
        tokenizer_dir,
        template_text(config.chat_template),
        config.loss_on,
        skip_bad=config.bad_record == "skip",
        kind=kind,
    )
    # The keys of a preference say what it is; nothing is to be stated or found out.
    conversations = kind is Kind.CONVERSATIONS
    formats = [record_format(source) if conversations else "prompt_completion" for source in sources]
    try:
        with _unfinished(directory) as temporary:
            with _advance(sources, shown=progress) as advance:
                stream = encode_sources(sources, formats, rendering, config.workers)
                _write(temporary, stream, sources, advance)
            try:
                sync_tree(temporary)
                os.rename(temporary, directory)
                sync(directory.parent)
            except OSError:
                if not directory.is_dir():
                    raise
    except OSError as error:
        raise DataError(f"cache_dir {config.cache_dir}: the cache cannot be written: {error}") from error


@contextmanager
def _unfinished(directory: Path) -> Iterator[Path]:
    """A directory beside `directory`, to be renamed to it; removes those that killed processes have left.

    A lock beside it says that somebody is at work, and ends with its holder.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left in directory.parent.glob(f".{directory.name}.*.lock"):
        with suppress(OSError), left.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink()
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    path = temporary.with_suffix(f"{temporary.suffix}.lock")
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            path.unlink(missing_ok=True)  # another process may have taken it for one that was left


def _write(
    directory: Path,
    stream: Iterator[Encoded],
    origins: Sequence[SourceConfig],
    advance: Callable[[int], None],
) -> None:
    lengths, n_loss, lines, sources, answers = [], [], [], [], []
    max_token, n_stops = 0, 0
    n_bad, first_bad = [0] * len(origins), ""
    with (directory / "tokens.bin").open("wb") as tokens, (directory / "learned.bin").open("wb") as learned:
        for chunk in stream:
            chunk.tokens.tofile(tokens)
            chunk.learned.astype(np.uint8).tofile(learned)
            n_before = np.concatenate(([0], np.cumsum(chunk.learned, dtype=np.int64)))
            ends = np.cumsum(chunk.lengths)
            n_loss.append(n_before[ends] - n_before[ends - chunk.lengths])
            lengths.append(chunk.lengths)
            lines.append(chunk.lines)
            sources.append(np.full(len(chunk.lengths), chunk.source, dtype=np.int32))
            max_token = max(max_token, int(chunk.tokens.max(initial=0)))
            n_stops += chunk.n_stops
            answers.append(chunk.answers)
            n_bad[chunk.source] += len(chunk.bad)
            first_bad = first_bad or (chunk.bad[0] if chunk.bad else "")
            advance(chunk.n_bytes)
    paths = ", ".join(str(origin.path) for origin in origins)
    if not any(map(len, lengths)):
        raise DataError(
            f"{paths}: no sample is left: {sum(n_bad):,} that cannot be read, the first: {first_bad}"
        )
    if n_stops == 0 and any(n.any() for n in n_loss):
        raise DataError(
            f"{paths}: no sample teaches a token that ends a turn, so the model would never stop; "
            "the template must end an assistant turn with a special token of the tokenizer, inside "
            "{% generation %} if it has that"
        )
    np.savez(
        directory / SAMPLES,
        lengths=np.concatenate(lengths),
        n_loss=np.concatenate(n_loss),
        lines=np.concatenate(lines),
        sources=np.concatenate(sources),
    )
    if any(len(table) for table in answers):
        np.save(directory / "answers.npy", np.concatenate(answers))
    meta = {
        "n_tokens": int(sum(part.sum() for part in lengths)),
        "max_token": max_token,
        "paths": [str(origin.path) for origin in origins],
        "n_bad": n_bad,
        "first_bad": first_bad,
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=1))


@contextmanager
def _advance(sources: Sequence[SourceConfig], *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told the bytes that are done, and moves a bar if it is to be shown."""
    if not shown:
        yield lambda n_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=sum(map(_size, sources)))
        yield lambda n_bytes: bar.advance(task, n_bytes)
        bar.update(task, completed=bar.tasks[task].total)


def _size(source: SourceConfig) -> int:
    return sum(file.stat().st_size for file in content_files(source.path))


def _count(which: np.ndarray) -> int:
    return int(np.count_nonzero(which))


def _samples(which: np.ndarray) -> str:
    n = _count(which)
    return "1 sample is" if n == 1 else f"{n:,} samples are"
