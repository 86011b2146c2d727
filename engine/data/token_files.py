"""Tokens on disk, made once for each content.

    <cache_dir>/<key>.v3/tokens.bin    int32, all answers end to end, each behind its prompt; a chat is one answer
                         weights.bin   float32, what each token counts in the loss; 0 where it is not learned
                         samples.npz   per answer: lengths, n_loss, token_weights, lines, sources
                         answers.npy   only of preferences: per answer a row of ANSWER
                         meta.json     n_tokens, max_token, paths; per source n_bad; first_bad; n_remade; now
                         checksums.json   of all these

The key names the samples, and the ending this form of their files: fingerprints of runs are made of the key, so that
they outlive the form. A directory is written under a temporary name and renamed, so that one of the final name is
complete; of two processes that write the same one, the first to end wins. What is not as it was written is made
anew. Sources are hashed for the key, and again as they are tokenised: what is kept under a key is made of its bytes.
N answers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from paralign.models.errors import DataError

from ..batch import Kind
from ..files.array_file import read_array, read_arrays
from ..files.checksums import broken_file, has_checksums, write_checksums
from ..files.number_file import NumberFile
from ..files.whole_file import name_directory, replace_directory
from .config import DataConfig, SourceConfig
from .encode import ANSWER, Encoded, Rendering, encode_sources
from .render import template_text, was_read_otherwise
from .sources import content_files, record_format
from .tokenizer import OTHER_TEMPLATES, TOKENIZER_FILES

VERSION = 2  # of what render makes of a conversation; part of the key
FORM = ".v3"  # of the files above
# Behind it for templates that older versions read otherwise: their tokens are not taken for ours, and the key stays.
READ_ANEW = "b"
SAID = 10**9  # bytes from which on it is said how long checking took
TOKENS, SAMPLES, ANSWERS = "tokens.bin", "samples.npz", "answers.npy"
COLUMNS = ("lengths", "n_loss", "token_weights", "lines", "sources")
CHAT = np.array(
    (1, 0, 0, False, np.nan, 0.0), dtype=ANSWER
)  # nothing stands before a chat but its first token


@dataclass
class StoredAnswers:
    """What lies in a directory: every answer that was rendered, kept or not.

    Attributes:
        tokens, weights: the files, read as far as they are asked for.
        starts, lengths: int64 (N,), where each answer begins in them, and its tokens, prompt included.
        n_loss: int64 (N,), tokens to be predicted.
        token_weights: float64 (N,), what they count together.
        lines, sources: (N,), the line that each begins at, and the index of its source.
        answers: of ANSWER (N,), that of a chat where there is no such file.
        has_answers: whether there is.
        n_remade: samples that older versions refused or made otherwise, see `Renderer.n_remade`.
    """

    tokens: NumberFile
    weights: NumberFile
    starts: np.ndarray
    lengths: np.ndarray
    n_loss: np.ndarray
    token_weights: np.ndarray
    lines: np.ndarray
    sources: np.ndarray
    answers: np.ndarray
    has_answers: bool
    max_token: int
    n_bad: tuple[int, ...]
    first_bad: str
    n_remade: int

    @classmethod
    def read(cls, directory: Path) -> StoredAnswers:
        """Opens the files of a directory; raises DataError if they are not whole."""
        try:
            meta = json.loads((directory / "meta.json").read_text())
            about: dict[str, Any] = {name: meta[name] for name in ("max_token", "first_bad")} | {
                "n_bad": tuple(meta["n_bad"]),
                "n_remade": meta.get("n_remade", 0),
            }
            n_tokens = meta["n_tokens"]
            columns: dict[str, Any] = dict(zip(COLUMNS, read_arrays(directory / SAMPLES, *COLUMNS)))
            lengths = columns["lengths"]
            has_answers = (directory / ANSWERS).is_file()
            answers = read_array(directory / ANSWERS) if has_answers else np.broadcast_to(CHAT, len(lengths))
            tokens = NumberFile(directory / TOKENS, np.int32)
            weights = NumberFile(directory / "weights.bin", np.float32)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{directory}: not a cache of tokens ({error}); delete it") from None
        if not len(tokens) == len(weights) == n_tokens == lengths.sum():
            raise DataError(f"{directory}: tokens are missing; the disk may be full; delete it")
        return cls(
            tokens=tokens,
            weights=weights,
            starts=np.cumsum(lengths) - lengths,
            **columns,
            answers=answers,
            has_answers=has_answers,
            **about,
        )

    def cut(self, which: np.ndarray, limit: int) -> None:
        """Leaves the first `limit` tokens of some answers."""
        for i in which.tolist():
            weights = self.weights[self.starts[i] : self.starts[i] + limit]
            self.lengths[i], self.n_loss[i] = limit, np.count_nonzero(weights)
            self.token_weights[i] = weights.sum(dtype=np.float64)


@dataclass(frozen=True)
class Content:
    """What a cache is made of, and its name.

    Attributes:
        directory: of the cache.
        sources: with their formats.
        template: its text.
        digests: SHA-256 of each file of the sources.
        tokenizer: SHA-256 of each file of the tokenizer, by name.
    """

    directory: Path
    sources: tuple[SourceConfig, ...]
    kind: Kind
    template: str | None
    digests: Mapping[Path, bytes]
    tokenizer: Mapping[str, bytes]


def build(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    tokenizer_dir: Path,
    kind: Kind,
    *,
    progress: bool,
    verify: bool = True,
) -> tuple[Path, Sequence[SourceConfig]]:
    """The directory of the cache, made now if it is not there yet, and the sources it was made of.

    Args:
        kind: what records are read as.
        progress: say what takes long.
        verify: compare a cache that is there with its checksums; one that is not as it was written is made anew.
    """
    content = content_of(config, sources, tokenizer_dir, kind)
    directory = content.directory
    if not directory.is_dir():
        key = samples_key(directory)
        names = [name for name in (key + FORM, key) if directory.with_name(name).is_dir()]
        older = directory.with_name(names[0]) if names else None
        if older and progress:
            print(
                f"{older}: tokens in an older form, not read; made anew in {directory.name}", file=sys.stderr
            )
        _build(content, config, tokenizer_dir, progress, older)
    elif verify and (fault := _fault(directory, progress)):
        print(f"{directory}: {fault}; made anew from the data", file=sys.stderr)
        _build(content, config, tokenizer_dir, progress, directory)
    return directory, content.sources


def _fault(directory: Path, progress: bool) -> str | None:
    """What is not as it was written, in a cache that is there."""
    try:
        if not has_checksums(directory):
            StoredAnswers.read(directory)
            if progress:
                print(
                    f"{directory}: tokens of an older version, without checksums: not checked",
                    file=sys.stderr,
                )
            return None
        start = time.perf_counter()
        if fault := broken_file(directory):
            return fault
        StoredAnswers.read(directory)
    except DataError as error:
        return str(error).removeprefix(f"{directory}: ").removesuffix("; delete it")
    n_bytes, seconds = sum(file.stat().st_size for file in directory.iterdir()), time.perf_counter() - start
    if progress and n_bytes >= SAID:
        rate = n_bytes / 1e9 / seconds
        print(
            f"{directory}: {n_bytes / 1e9:,.1f} GB checked in {seconds:,.0f} s, {rate:.1f} GB/s",
            file=sys.stderr,
        )
    return None


def content_of(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    tokenizer_dir: Path,
    kind: Kind = Kind.CONVERSATIONS,
) -> Content:
    """What the cache of some sources is made of, read now."""
    key = hashlib.sha256()

    def add(name: str, content: bytes) -> None:
        key.update(f"{name} {len(content)}\n".encode() + content)

    template = template_text(config.chat_template)
    tokenizer, digests = _tokenizer_digests(tokenizer_dir), dict[Path, bytes]()
    add("version", str(VERSION).encode())
    add("loss_on", config.loss_on.encode())
    add("bad_record", config.bad_record.encode())
    add("kind", kind.value.encode())
    add("template", (template or "").encode())
    for name, digest in tokenizer.items():
        add(name, digest)
    sources = tuple(
        source.model_copy(update={"format": source.format or config.format}) for source in sources
    )
    for source in sources:
        add("format", str(source.format).encode())
        add("columns", json.dumps(source.columns, sort_keys=True).encode())
        for file in content_files(source.path):
            digests[file] = _digest(file)
            add("content", digests[file])
    name = f"{key.hexdigest()[:32]}{FORM}"
    texts = [template] if template is not None else _template_files(tokenizer_dir)
    directory = config.cache_dir / (name + READ_ANEW if any(map(was_read_otherwise, texts)) else name)
    return Content(directory, sources, kind, template, digests, tokenizer)


def cache_directory(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    tokenizer_dir: Path,
    kind: Kind = Kind.CONVERSATIONS,
) -> Path:
    """Where the cache of this content is, or will be."""
    return content_of(config, sources, tokenizer_dir, kind).directory


def _tokenizer_digests(directory: Path) -> dict[str, bytes]:
    others = sorted(
        f"{OTHER_TEMPLATES}/{file.name}" for file in (directory / OTHER_TEMPLATES).glob("*.jinja")
    )
    return {
        name: _digest(directory / name)
        for name in (*TOKENIZER_FILES, *others)
        if (directory / name).is_file()
    }


def _template_files(directory: Path) -> list[str]:
    """What the tokenizer's own template, or several, stand in."""
    files = [
        directory / name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    ]
    files += sorted((directory / OTHER_TEMPLATES).glob("*.jinja"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]


def _now(older: Path | None) -> datetime:
    """The date for a chat template that writes one: that of the tokens before, which are made anew, or today."""
    if older is None:
        return datetime.now().replace(microsecond=0)
    try:
        return datetime.fromisoformat(json.loads((older / "meta.json").read_text())["now"])
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or of an older version
        tokens = older / TOKENS
        return datetime.fromtimestamp(int((tokens if tokens.is_file() else older).stat().st_mtime))


def samples_key(directory: Path) -> str:
    """What names the samples of a cache, in whatever form its files are."""
    return directory.name.partition(".")[0]


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _build(
    content: Content, config: DataConfig, tokenizer_dir: Path, progress: bool, older: Path | None
) -> None:
    """Makes the files of a cache.

    Args:
        older: where the tokens of the same content lie that these replace, if there are some.
    """
    directory, sources, now = content.directory, content.sources, _now(older)
    rendering = Rendering(
        tokenizer_dir, content.template, config.loss_on, skip_bad=config.bad_record == "skip", now=now
    )
    readings = [record_format(source, content.kind) for source in sources]
    try:
        with _unfinished(directory) as temporary:
            with _advance(sources, shown=progress) as advance:
                stream = encode_sources(sources, readings, rendering, config.workers, content.digests)
                _write(temporary, stream, sources, advance, now)
            if _tokenizer_digests(tokenizer_dir) != content.tokenizer:
                raise DataError(
                    f"{tokenizer_dir}: the tokenizer's files changed while it was used; start again"
                )
            write_checksums(temporary, sorted(file.name for file in temporary.iterdir()))
            if broken := directory.is_dir() and _fault(directory, progress=False):
                replace_directory(temporary, directory)
            try:
                if not broken:
                    name_directory(temporary, directory)
            except OSError:
                if not directory.is_dir():
                    raise
    except OSError as error:
        raise DataError(f"cache_dir {config.cache_dir}: the cache cannot be written: {error}") from error


@contextmanager
def _unfinished(directory: Path) -> Iterator[Path]:
    """A directory next to `directory`, to be renamed to it; removes those that killed processes have left.

    A lock next to it says that somebody is at work, and ends with its holder.
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
    now: datetime,
) -> None:
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    answers = []
    max_token, n_stops, n_remade = 0, 0, 0
    n_bad, first_bad = [0] * len(origins), ""
    with (directory / TOKENS).open("wb") as tokens, (directory / "weights.bin").open("wb") as weights:
        for chunk in stream:
            chunk.tokens.tofile(tokens)
            chunk.weights.tofile(weights)
            ends = np.cumsum(chunk.lengths)
            columns["lengths"].append(chunk.lengths)
            columns["n_loss"].append(_sums(chunk.weights > 0, ends, np.int64))
            columns["token_weights"].append(_sums(chunk.weights, ends, np.float64))
            columns["lines"].append(chunk.lines)
            columns["sources"].append(np.full(len(chunk.lengths), chunk.source, dtype=np.int32))
            max_token = max(max_token, int(chunk.tokens.max(initial=0)))
            n_stops += chunk.n_stops
            n_remade += chunk.n_remade
            answers.append(chunk.answers)
            n_bad[chunk.source] += len(chunk.bad)
            first_bad = first_bad or (chunk.bad[0] if chunk.bad else "")
            advance(chunk.n_bytes)
    os.utime(directory / TOKENS, times=(now.timestamp(),) * 2)  # the date again, should meta.json be damaged
    paths = ", ".join(str(origin.path) for origin in origins)
    samples = {name: np.concatenate(column) for name, column in columns.items()}
    if not len(samples["lengths"]):
        raise DataError(
            f"{paths}: no sample is left: {sum(n_bad):,} that cannot be read, the first: {first_bad}"
        )
    if n_stops == 0 and samples["n_loss"].any():
        raise DataError(
            f"{paths}: no sample teaches a token that ends a turn, so the model would never stop; "
            "the template must end an assistant turn with a special token of the tokenizer, inside "
            "{% generation %} if it has that"
        )
    np.savez(directory / SAMPLES, allow_pickle=False, **samples)
    if any(len(table) for table in answers):
        np.save(directory / ANSWERS, np.concatenate(answers))
    meta = {
        "n_tokens": int(samples["lengths"].sum()),
        "max_token": max_token,
        "paths": [str(origin.path) for origin in origins],
        "n_bad": n_bad,
        "first_bad": first_bad,
        "n_remade": n_remade,
        "now": now.isoformat(),
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=1))


def _sums(values: np.ndarray, ends: np.ndarray, dtype: type) -> np.ndarray:
    """Of each stretch of `values`, one behind the other up to `ends`."""
    before = np.concatenate(([0], np.cumsum(values, dtype=dtype)))
    return np.diff(before[np.concatenate(([0], ends))])


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
