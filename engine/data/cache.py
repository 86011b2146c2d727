"""The samples of a set: which answers form one, and which samples are kept. Owns the selection, not the files.

N answers on disk, G samples.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from paralign.models.errors import DataError

from ..batch import Column, Kind, Unit
from .answers import CHATS, Answer, AnswerLayout, Group
from .config import DataConfig, SourceConfig
from .token_files import StoredAnswers, build, samples_key


@dataclass(frozen=True)
class TokenCache:
    """The samples to train on, each a prompt with its answers: those on disk, less the too long and the idle.

    A chat is a sample of one answer. Opened by `TokenCache.open`; memory-mapped, and pickled as the way to open it
    again. N answers on disk, G samples.

    Attributes:
        directory, origins, config: what it was opened with; `origins` are the sources of this set.
        layout: how samples are laid out in packs, which decides how many rows they take.
        score_range: lowest and highest score in the data, or None if scores are not read.
        has_answers: samples are prompts with answers, not chats.
        fingerprint: names content, selection and weights; equal ones have equal samples under equal ids, and equal
            epochs.
        tokens: int32, memory-mapped, the answers end to end, each behind its prompt.
        weights: float32, memory-mapped, what each token counts in the loss; 0 where it is not learned.
        starts, ends: int64 (N,), where each answer begins, prompt included, and ends.
        answers: of ANSWER (N,), what is known of each besides.
        members: int64, the answers of all samples, end to end.
        first_member, n_answers: int64 (G,), where the answers of each sample begin in `members`, and how many.
        lengths: int64 (G,), rows of each sample, at most `tokens_per_pack`.
        n_loss: int64 (G,), tokens of its answers to be predicted.
        token_weights: float64 (G,), what its tokens count together in a loss over tokens: their weights; of answers
            those of the first, with its prompt where that is learned too.
        sources: int32 (G,), index into `origins`.
        lines: int64 (G,), the line each sample begins at; of a table, its row.
        max_token: largest token id of the cache; the model's vocabulary must be larger.
        n_dropped, n_truncated, n_skipped: samples too long (dropped, cut) and with nothing to learn.
        n_bad: for each source, the records that could not be read or rendered and were left out.
        first_bad: what was wrong with the first of them; empty if there is none.
    """

    directory: Path
    origins: tuple[SourceConfig, ...]
    config: DataConfig
    layout: AnswerLayout
    score_range: tuple[float, float] | None
    has_answers: bool
    fingerprint: str
    tokens: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    answers: np.ndarray
    members: np.ndarray
    first_member: np.ndarray
    n_answers: np.ndarray
    lengths: np.ndarray
    n_loss: np.ndarray
    token_weights: np.ndarray
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
        return TokenCache.open, (self.directory, self.origins, self.config, self.layout, self.score_range)

    @property
    def n_all_answers(self) -> int:
        """Answers on disk, those of samples left out too: one more than the largest answer id."""
        return len(self.starts)

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """int64 (G,), tokens of each sample's answers, the prompt counted with each."""
        return np.add.reduceat((self.ends - self.starts)[self.members], self.first_member)

    def last_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset(np.unique(self.tokens[self.ends - 1]).tolist())

    def place(self, id_: int) -> str:
        """file:line of one sample."""
        return f"{self.origins[self.sources[id_]].path}:{self.lines[id_]}"

    def group(self, id_: int) -> Group:
        """One sample; its tokens are views of the file."""
        first = self.first_member[id_]
        members = self.members[first : first + self.n_answers[id_]]
        about = self.answers[members]
        start, n_prompt = self.starts[members[0]], int(about["prompt"][0])
        return Group(
            prompt=self.tokens[start : start + n_prompt],
            answers=tuple(
                Answer(
                    tokens=self.tokens[self.starts[i] + n_prompt : self.ends[i]],
                    weights=self.weights[self.starts[i] + n_prompt : self.ends[i]],
                    id=int(i),
                    desirable=bool(row["desirable"]),
                    score=self._normalised(float(row["score"])),
                )
                for i, row in zip(members, about)
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
        """Maps the cache in `directory`, groups its answers and selects the samples that `config` lets through.

        Raises:
            DataError: not a whole cache; a sample too long or with nothing to learn, where that is an error; no
                sample left of a source that is to be seen; a score outside its range; labels of one kind only, where
                the objective compares the two.
        """
        stored = StoredAnswers.read(directory)
        _check_answers(stored, origins, layout, score_range)
        limit = config.tokens_per_pack
        members, first_member = _grouped(stored, layout, limit)
        n_answers = np.diff(np.concatenate((first_member, [len(members)])))
        firsts = members[first_member]
        sources, lines = stored.sources[firsts], stored.lines[firsts]

        def per_sample(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values[members], first_member) if len(members) else values[:0]

        def first(which: np.ndarray) -> str:
            i = int(np.flatnonzero(which)[0])
            what = "rows for a prompt and its answers" if stored.has_answers else "tokens"
            return f"{origins[sources[i]].path}:{lines[i]}: {lengths[i]:,} {what}"

        answer_tokens = stored.lengths - stored.answers["prompt"]
        lengths = layout.rows(stored.answers["prompt"][firsts], n_answers, per_sample(answer_tokens))
        long = lengths > limit
        if long.any() and config.too_long == "error":
            remedy = "drop" if stored.has_answers else "drop or truncate"
            raise DataError(
                f"{first(long)}; tokens_per_pack is {limit:,} and {_samples(long)} longer; "
                f"raise tokens_per_pack, or set too_long: {remedy}"
            )
        keep = ~long
        if config.too_long == "truncate":  # chats only: a sample is an answer
            stored.cut(np.flatnonzero(long), limit)
            keep[:], lengths = True, np.minimum(lengths, limit)
        n_loss, token_weights = per_sample(stored.n_loss), stored.token_weights[firsts]
        if layout.labels_prompts:
            token_weights = (stored.lengths[firsts] - 1).astype(np.float64)
        barren = keep & (n_loss == 0)
        if barren.any() and config.nothing_to_learn == "error":
            raise DataError(
                f"{first(barren)}, none of them to be learned (no assistant turn, or it was cut off), like "
                f"{_count(barren):,} in all; mend them, or set nothing_to_learn: skip"
            )
        n_truncated, n_dropped = _count(keep & long), _count(~keep)
        keep &= ~barren
        for index, origin in enumerate(origins):
            here = sources == index
            if origin.weight and not (keep & here).any():
                raise DataError(
                    f"{origin.path}: no sample is left: {_count(here & long)} longer than {limit:,} tokens, "
                    f"{_count(here & barren)} with nothing to learn, {stored.n_bad[index]:,} that cannot be read"
                    + (f", the first of all: {stored.first_bad}" if stored.first_bad else "")
                )
        # What running jobs were saved with: not to be changed for the same samples in the same packs.
        selection = [samples_key(directory), limit, config.too_long]
        weights = [origin.weight for origin in origins]
        if stored.has_answers:
            selection += [weights, layout.share_prefix, Column.PAIR in layout.needs]
        else:
            selection += [config.nothing_to_learn, weights]
        return cls(
            directory=directory,
            origins=tuple(origins),
            config=config,
            layout=layout,
            score_range=score_range,
            has_answers=stored.has_answers,
            fingerprint=hashlib.sha256(" ".join(map(str, selection)).encode()).hexdigest()[:32],
            tokens=stored.tokens,
            weights=stored.weights,
            starts=stored.starts,
            ends=stored.starts + stored.lengths,
            answers=stored.answers,
            members=members,
            first_member=first_member[keep],
            n_answers=n_answers[keep],
            lengths=lengths[keep],
            n_loss=n_loss[keep],
            token_weights=token_weights[keep],
            sources=sources[keep],
            lines=lines[keep],
            max_token=stored.max_token,
            n_dropped=n_dropped,
            n_truncated=n_truncated,
            n_skipped=_count(barren),
            n_bad=stored.n_bad,
            first_bad=stored.first_bad,
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
) -> TokenCache:
    """The cache of `sources`, tokenised now if it is not there yet.

    Args:
        sources: of one training set or one validation set, see `DataConfig.sets`.
        tokenizer_dir: a Hugging Face directory with a fast tokenizer.
        kind: what records are read as.
        layout, score_range: see TokenCache.
        progress: show a bar while tokenising.

    Raises:
        DataError, WeightsError: what is wrong with which line, template or tokenizer.
    """
    directory, opened = build(config, sources, tokenizer_dir, kind, progress=progress)
    return TokenCache.open(directory, opened, config, layout, score_range)


def stop_token(cache: TokenCache, *, n_samples: int = 1000) -> int | None:
    """The id that ends most answers of the first samples; None where whole texts are learned, not answers."""
    if cache.config.loss_on == "all":
        return None
    ends: Counter[int] = Counter()
    for i in range(min(n_samples, len(cache))):
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


def _samples(which: np.ndarray) -> str:
    n = _count(which)
    return "1 sample is" if n == 1 else f"{n:,} samples are"
