"""The samples of a set: which answers form one, and which samples are kept.

N answers on disk, G samples.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paralign.models.errors import DataError

from ..batch import Column, Kind, Unit
from .answers import CHATS, Answer, AnswerLayout, Group
from .config import DataConfig, SourceConfig
from .token_files import StoredAnswers, build, samples_key


@dataclass(frozen=True)
class TokenCache:
    """The samples to train on, each a prompt with its answers: those on disk, less the too long and the idle.

    A chat is a sample of one answer. Opened by `TokenCache.open`; tokens stay on disk, and it is pickled as the way
    to open it again. G samples.

    Attributes:
        directory, origins, config: what it was opened with; `origins` are the sources of this set.
        layout: how samples are laid out in packs, which decides how many rows they take.
        score_range: lowest and highest score in the data, or None if scores are not read.
        stored: the answers of all samples on disk, and what was left out when they were read.
        members: int64, the answers of all samples, end to end.
        first_member, n_answers: int64 (G,), where the answers of each sample begin in `members`, and how many.
        lengths: int64 (G,), rows of each sample, at most `tokens_per_pack`.
        n_loss: int64 (G,), tokens of its answers to be predicted.
        token_weights: float64 (G,), what its tokens count together in a loss over tokens: their weights; of answers
            those of the first, with its prompt where that is learned too.
        sources: int32 (G,), index into `origins`.
        lines: int64 (G,), the line each sample begins at; of a table, its row.
        n_dropped, n_truncated, n_skipped: samples too long (dropped, cut) and with nothing to learn.
    """

    directory: Path
    origins: tuple[SourceConfig, ...]
    config: DataConfig
    layout: AnswerLayout
    score_range: tuple[float, float] | None
    stored: StoredAnswers
    members: np.ndarray
    first_member: np.ndarray
    n_answers: np.ndarray
    lengths: np.ndarray
    n_loss: np.ndarray
    token_weights: np.ndarray
    sources: np.ndarray
    lines: np.ndarray
    n_dropped: int = 0
    n_truncated: int = 0
    n_skipped: int = 0

    @property
    def tokens(self) -> np.ndarray:
        """int32, those of all answers on disk, read now."""
        return self.stored.tokens[:]

    @property
    def max_token(self) -> int:
        return self.stored.max_token

    @property
    def has_answers(self) -> bool:
        return self.stored.has_answers

    @property
    def n_bad(self) -> tuple[int, ...]:
        return self.stored.n_bad

    @property
    def first_bad(self) -> str:
        return self.stored.first_bad

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Callable[..., TokenCache], tuple[object, ...]]:
        return TokenCache.open, (self.directory, self.origins, self.config, self.layout, self.score_range)

    @property
    def fingerprint(self) -> str:
        """Names content, selection and weights: equal ones have equal samples under equal ids, and equal epochs.

        Running jobs were saved with it: not to be changed for the same samples in the same packs.
        """
        config, weights = self.config, [origin.weight for origin in self.origins]
        selection: list[object] = [samples_key(self.directory), config.tokens_per_pack, config.too_long]
        if self.has_answers:
            selection += [weights, self.layout.share_prefix, Column.PAIR in self.layout.needs]
        else:
            selection += [config.nothing_to_learn, weights]
        if self.stored.n_remade:  # samples that older versions left out under the same key
            selection.append(self.stored.n_remade)
        return hashlib.sha256(" ".join(map(str, selection)).encode()).hexdigest()[:32]

    @property
    def n_all_answers(self) -> int:
        """Answers on disk, those of samples left out too: one more than the largest answer id."""
        return len(self.stored.starts)

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """int64 (G,), tokens of each sample's answers, the prompt counted with each."""
        return np.add.reduceat(self.stored.lengths[self.members], self.first_member)

    def last_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        stored = self.stored
        return frozenset(np.unique(stored.tokens.at(stored.starts + stored.lengths - 1)).tolist())

    def place(self, id_: int) -> str:
        """file:line of one sample."""
        return f"{self.origins[self.sources[id_]].path}:{self.lines[id_]}"

    def group(self, id_: int) -> Group:
        """One sample, read now; DataError where the files were cut since they were opened."""
        first = self.first_member[id_]
        members = self.members[first : first + self.n_answers[id_]]
        stored, about = self.stored, self.stored.answers[members]
        starts, n_prompt = stored.starts[members], int(about["prompt"][0])
        return Group(
            prompt=stored.tokens[starts[0] : starts[0] + n_prompt],
            answers=tuple(
                Answer(
                    tokens=stored.tokens[start + n_prompt : start + length],
                    weights=stored.weights[start + n_prompt : start + length],
                    id=int(i),
                    desirable=bool(row["desirable"]),
                    score=self._normalised(float(row["score"])),
                )
                for i, start, length, row in zip(members, starts, stored.lengths[members], about)
            ),
            margin=float(about["margin"][0]),
        )

    def counts(self, ids: np.ndarray) -> dict[Unit, float]:
        """What losses over these samples are divided by."""
        return {
            Unit.TOKEN: float(self.token_weights[ids].sum()),
            Unit.SAMPLE: int(self.n_answers[ids].sum()),
            Unit.PAIR: len(ids) if Column.PAIR in self.layout.needs else 0,
        }

    @classmethod
    def open(
        cls,
        directory: Path,
        origins: Sequence[SourceConfig],
        config: DataConfig,
        layout: AnswerLayout = CHATS,
        score_range: tuple[float, float] | None = None,
    ) -> TokenCache:
        """Opens the cache in `directory`, groups its answers and selects the samples that `config` lets through.

        Raises:
            DataError: not a whole cache; a sample too long or with nothing to learn, where that is an error; no
                sample left of a source that is to be seen; a score outside its range; labels of one kind only, where
                the objective compares the two.
        """
        stored = StoredAnswers.read(directory)
        _check_answers(stored, origins, layout, score_range)
        limit = config.tokens_per_pack
        members, first_member = _grouped(stored, layout, limit)
        columns = _columns(stored, layout, members, first_member)
        every = cls(directory, tuple(origins), config, layout, score_range, stored, members, **columns)
        long = every.lengths > limit
        if config.too_long == "truncate":  # chats only: a sample is an answer
            stored.cut(np.flatnonzero(long), limit)
            columns = _columns(stored, layout, members, first_member)
            every = replace(every, **columns, n_truncated=_count(long))
        fits = every.lengths <= limit
        idle = fits & (every.n_loss == 0)
        every._check(long, idle)
        kept = {name: column[fits & ~idle] for name, column in columns.items()}
        return replace(every, **kept, n_dropped=_count(~fits), n_skipped=_count(idle))

    def _check(self, long: np.ndarray, idle: np.ndarray) -> None:
        """Raises DataError for samples that `config` does not want, and for a source of which none is left.

        Args:
            long, idle: bool (G,), longer than a pack, before any was cut; in one, with nothing to learn.
        """
        config, limit = self.config, self.config.tokens_per_pack

        def first(which: np.ndarray) -> str:
            i = int(np.flatnonzero(which)[0])
            what = "rows for a prompt and its answers" if self.has_answers else "tokens"
            return f"{self.place(i)}: {self.lengths[i]:,} {what}"

        if long.any() and config.too_long == "error":
            remedy = "drop" if self.has_answers else "drop or truncate"
            longer = "1 sample is" if _count(long) == 1 else f"{_count(long):,} samples are"
            raise DataError(
                f"{first(long)}; tokens_per_pack is {limit:,} and {longer} longer; "
                f"raise tokens_per_pack, or set too_long: {remedy}"
            )
        if idle.any() and config.nothing_to_learn == "error":
            raise DataError(
                f"{first(idle)}, none of them to be learned (no assistant turn, or it was cut off), like "
                f"{_count(idle):,} in all; mend them, or set nothing_to_learn: skip"
            )
        kept = (self.lengths <= limit) & ~idle
        for index, origin in enumerate(self.origins):
            here = self.sources == index
            if origin.weight and not (kept & here).any():
                raise DataError(
                    f"{origin.path}: no sample is left: {_count(here & long)} longer than {limit:,} tokens, "
                    f"{_count(here & idle)} with nothing to learn, {self.n_bad[index]:,} that cannot be read"
                    + (f", the first of all: {self.first_bad}" if self.first_bad else "")
                )

    def _normalised(self, score: float) -> float:
        if self.score_range is None:
            return float("nan")
        low, high = self.score_range
        return 2 * (score - low) / (high - low) - 1


def build_or_open(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    tokenizer_dir: Path,
    kind: Kind = Kind.CONVERSATIONS,
    layout: AnswerLayout = CHATS,
    score_range: tuple[float, float] | None = None,
    *,
    progress: bool,
    verify: bool = True,
) -> TokenCache:
    """The cache of `sources`, tokenised now if it is not there yet, or not as it was written.

    Args:
        sources: of one training set or one validation set, see `DataConfig.sets`.
        tokenizer_dir: a Hugging Face directory with a fast tokenizer.
        kind: what records are read as.
        layout, score_range: see TokenCache.
        progress: show a bar while tokenising, and say what was checked.
        verify: compare its files with their checksums.

    Raises:
        DataError, WeightsError: what is wrong with which line, template or tokenizer.
    """
    directory, opened = build(config, sources, tokenizer_dir, kind, progress=progress, verify=verify)
    return TokenCache.open(directory, opened, config, layout, score_range)


def stop_token(cache: TokenCache) -> int | None:
    """The id that ends most answers of the first samples; None where whole texts are learned, not answers."""
    if cache.config.loss_on == "all":
        return None
    ends: Counter[int] = Counter()
    for i in range(min(1000, len(cache))):
        answer = cache.group(i).answers[0]
        ends[int(answer.tokens[np.flatnonzero(answer.weights)[-1]])] += 1
    (token, count), *_ = ends.most_common(1)
    return token if 2 * count > ends.total() else None


def _check_answers(
    stored: StoredAnswers,
    origins: Sequence[SourceConfig],
    layout: AnswerLayout,
    score_range: tuple[float, float] | None,
) -> None:
    """Raises DataError for a score outside its range, or labels of one kind where the objective compares the two."""
    answers = stored.answers
    if score_range is not None:
        outside = (answers["score"] < score_range[0]) | (answers["score"] > score_range[1])
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            raise DataError(
                f"{origins[stored.sources[i]].path}:{stored.lines[i]}: score {answers['score'][i]:g} lies outside "
                f"score_range {list(score_range)}; mend the record, or state the range of the data"
            )
    if Column.DESIRABLE in layout.needs and (answers["desirable"].all() or not answers["desirable"].any()):
        raise DataError(
            f"{', '.join(str(origin.path) for origin in origins)}: every label is "
            f"{str(bool(answers['desirable'][0])).lower()}; expected good answers and bad ones"
        )


def _columns(
    stored: StoredAnswers, layout: AnswerLayout, members: np.ndarray, first_member: np.ndarray
) -> dict[str, Any]:
    """The columns of TokenCache for every sample on disk, whether it is to be kept or not."""
    n_answers = np.diff(np.concatenate((first_member, [len(members)])))
    firsts, prompts = members[first_member], stored.answers["prompt"]

    def summed(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values[members], first_member) if len(members) else values[:0]

    with_prompt = (stored.lengths[firsts] - 1).astype(np.float64)
    return {
        "first_member": first_member,
        "n_answers": n_answers,
        "lengths": layout.rows(prompts[firsts], n_answers, summed(stored.lengths - prompts)),
        "n_loss": summed(stored.n_loss),
        "token_weights": with_prompt if layout.labels_prompts else stored.token_weights[firsts],
        "sources": stored.sources[firsts],
        "lines": stored.lines[firsts],
    }


def _grouped(stored: StoredAnswers, layout: AnswerLayout, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (N,), answers, sample after sample; int64 (G,), where each sample begins in them."""
    every = np.arange(len(stored.lengths))
    if not stored.has_answers:
        return every, every
    if Column.PAIR in layout.needs:
        return every, every[stored.answers["rank"] == 0]
    return _by_prompt(stored, layout, limit)


def _by_prompt(stored: StoredAnswers, layout: AnswerLayout, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """`_grouped` for answers of one source to one prompt, as many in a sample as a pack has room for.

    Samples come in the order of their first answers.
    """
    answer_tokens = stored.lengths - stored.answers["prompt"]
    groups: list[list[int]] = []
    open_group: dict[tuple[int, int], tuple[int, int]] = {}  # (source, prompt) → group, its answers' tokens
    for i, (row, source, n_tokens) in enumerate(
        zip(stored.answers, stored.sources.tolist(), answer_tokens.tolist())
    ):
        key = (source, int(row["prompt_key"]))
        if layout.share_prefix and key in open_group:
            group, so_far = open_group[key]
            n_answers = np.array(len(groups[group]) + 1)
            if layout.rows(row["prompt"], n_answers, np.array(so_far + n_tokens)) <= limit:
                groups[group].append(i)
                open_group[key] = group, so_far + n_tokens
                continue
        open_group[key] = len(groups), n_tokens
        groups.append([i])
    sizes = np.array([len(group) for group in groups])
    return np.array([i for group in groups for i in group]), np.cumsum(sizes) - sizes


def _count(which: np.ndarray) -> int:
    return int(np.count_nonzero(which))
