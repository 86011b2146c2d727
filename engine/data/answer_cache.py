"""Answers on disk, grouped under their prompts. Owns which answers form a group and which groups are kept.

It reads what cache.py wrote of preferences: each answer a sample, its whole conversation as tokens, and

    answers.npy    per sample, of ANSWER: what is known of it besides its tokens

N answers, G groups.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paralign.models.errors import DataError

from ..array_file import read_array, read_arrays
from ..batch import Column, Unit
from .answers import Answer, AnswerLayout, Group
from .cache import SAMPLE_COLUMNS, SAMPLES
from .config import DataConfig, SourceConfig


@dataclass(frozen=True)
class AnswerCache:
    """The groups to train on, less those that are too long; what a TokenCache is to conversations.

    Attributes:
        directory, origins, config: what it was opened with.
        layout: how groups are laid out in packs, which decides how many rows they take.
        score_range: lowest and highest score in the data, or None if scores are not read.
        fingerprint: names content, selection and weights; equal ones have equal groups under equal ids.
        lengths: int64 (G,), rows of each group.
        n_loss: int64 (G,), tokens of each group's answers to be predicted.
        n_likelihood: int64 (G,), tokens of its first answer that a likelihood is averaged over.
        n_answers: int64 (G,).
        sources, lines: (G,), index into `origins`, and the line each group begins at.
        members: int64, the answers of all groups, end to end.
        max_token: largest token id.
        last_tokens: ids that end an answer.
        n_dropped: groups too long.
        n_bad, first_bad: records that were left out, for each source, and what was wrong with the first.
    """

    directory: Path
    origins: tuple[SourceConfig, ...]
    config: DataConfig
    layout: AnswerLayout
    score_range: tuple[float, float] | None
    fingerprint: str
    tokens: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    answers: np.ndarray
    members: np.ndarray
    first_member: np.ndarray
    lengths: np.ndarray
    n_loss: np.ndarray
    n_likelihood: np.ndarray
    n_answers: np.ndarray
    sources: np.ndarray
    lines: np.ndarray
    max_token: int
    last_tokens: frozenset[int]
    n_dropped: int
    n_bad: tuple[int, ...]
    first_bad: str
    n_truncated: int = 0
    n_skipped: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Callable[..., AnswerCache], tuple[object, ...]]:
        return AnswerCache.open, (self.directory, self.origins, self.config, self.layout, self.score_range)

    @property
    def n_all_answers(self) -> int:
        """Answers on disk, those of groups left out too: one more than the largest answer id."""
        return len(self.answers)

    def place(self, id_: int) -> str:
        """file:line of one group."""
        return f"{self.origins[self.sources[id_]].path}:{self.lines[id_]}"

    def group(self, id_: int) -> Group:
        """One group; its tokens are views of the file."""
        first = self.first_member[id_]
        members = self.members[first : first + self.n_answers[id_]]
        about = self.answers[members]
        n_prompt = int(about["prompt"][0])
        start = self.starts[members[0]]
        return Group(
            prompt=self.tokens[start : start + n_prompt],
            answers=tuple(
                Answer(
                    tokens=self.tokens[self.starts[i] + n_prompt : self.ends[i]],
                    learned=self.learned[self.starts[i] + n_prompt : self.ends[i]],
                    id=int(i),
                    desirable=bool(row["desirable"]),
                    score=self._normalised(float(row["score"])),
                )
                for i, row in zip(members, about)
            ),
            margin=float(about["margin"][0]),
        )

    def counts(self, ids: np.ndarray) -> dict[Unit, int]:
        """What losses over these groups are divided by."""
        return {
            Unit.TOKEN: int(self.n_likelihood[ids].sum()),
            Unit.SAMPLE: int(self.n_answers[ids].sum()),
            Unit.PAIR: len(ids) if Column.PAIR in self.layout.needs else 0,
        }

    def _normalised(self, score: float) -> float:
        if self.score_range is None:
            return float("nan")
        low, high = self.score_range
        return 2 * (score - low) / (high - low) - 1

    @classmethod
    def open(
        cls,
        directory: Path,
        origins: Sequence[SourceConfig],
        config: DataConfig,
        layout: AnswerLayout,
        score_range: tuple[float, float] | None = None,
    ) -> AnswerCache:
        """Maps the answers in `directory` and groups them.

        Raises:
            DataError: not a whole cache; a group longer than a pack, where that is an error; no group left; a
                score outside its range; labels of one kind only, where the objective compares the two.
        """
        try:
            meta = json.loads((directory / "meta.json").read_text())
            n_tokens, _ = meta["n_tokens"], (meta["n_bad"], meta["first_bad"], meta["max_token"])
            token_counts, n_loss, lines, sources = read_arrays(directory / SAMPLES, *SAMPLE_COLUMNS)
            answers = read_array(directory / "answers.npy")
            tokens = np.memmap(directory / "tokens.bin", dtype=np.int32, mode="r")
            learned = np.memmap(directory / "learned.bin", dtype=np.uint8, mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{directory}: not a cache of answers ({error}); delete it") from None
        if not len(tokens) == len(learned) == n_tokens == token_counts.sum():
            raise DataError(f"{directory}: tokens are missing; the disk may be full; delete it")
        ends = np.cumsum(token_counts)
        starts = ends - token_counts

        def place(answer: int) -> str:
            return f"{origins[sources[answer]].path}:{lines[answer]}"

        if score_range is not None:
            outside = (answers["score"] < score_range[0]) | (answers["score"] > score_range[1])
            if outside.any():
                i = int(np.flatnonzero(outside)[0])
                raise DataError(
                    f"{place(i)}: score {answers['score'][i]:g} lies outside score_range {list(score_range)}; "
                    "mend the record, or state the range of the data"
                )
        if Column.DESIRABLE in layout.needs and (
            answers["desirable"].all() or not answers["desirable"].any()
        ):
            raise DataError(
                f"{', '.join(str(origin.path) for origin in origins)}: every label is "
                f"{str(bool(answers['desirable'][0])).lower()}; expected good answers and bad ones"
            )
        answer_tokens = token_counts - answers["prompt"]
        if Column.PAIR in layout.needs:
            members = np.arange(len(answers))
            first_member = members[answers["rank"] == 0]
        else:
            members, first_member = _by_prompt(
                answers, sources, answer_tokens, layout, config.tokens_per_pack
            )
        n_answers = np.diff(np.concatenate((first_member, [len(members)])))

        def per_group(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values[members], first_member) if len(members) else values[:0]

        firsts = members[first_member]
        lengths = layout.rows(answers["prompt"][firsts], n_answers, per_group(answer_tokens))
        likelihood = token_counts[firsts] - 1 if layout.labels_prompts else n_loss[firsts]
        keep = lengths <= config.tokens_per_pack
        if not keep.all() and config.too_long == "error":
            i = int(np.flatnonzero(~keep)[0])
            raise DataError(
                f"{place(firsts[i])}: {lengths[i]:,} rows for a prompt and its answers; tokens_per_pack is "
                f"{config.tokens_per_pack:,} and {int((~keep).sum()):,} longer; raise tokens_per_pack, or set "
                "too_long: drop"
            )
        for i, origin in enumerate(origins):
            here = sources[firsts] == i
            if origin.weight and not (keep & here).any():
                raise DataError(
                    f"{origin.path}: nothing is left: {int((here & ~keep).sum())} longer than "
                    f"{config.tokens_per_pack:,} rows, {meta['n_bad'][i]:,} that cannot be used"
                    + (f", the first of all: {meta['first_bad']}" if meta["first_bad"] else "")
                )
        weights = [origin.weight for origin in origins]
        selection = (
            f"{directory.name} {config.tokens_per_pack} {config.too_long} {weights} {layout.share_prefix} "
            f"{Column.PAIR in layout.needs}"
        )
        return cls(
            directory=directory,
            origins=tuple(origins),
            config=config,
            layout=layout,
            score_range=score_range,
            fingerprint=hashlib.sha256(selection.encode()).hexdigest()[:32],
            tokens=tokens,
            learned=learned,
            starts=starts,
            ends=ends,
            answers=answers,
            members=members,
            first_member=first_member[keep],
            lengths=lengths[keep],
            n_loss=per_group(n_loss)[keep],
            n_likelihood=likelihood[keep],
            n_answers=n_answers[keep],
            sources=sources[firsts][keep],
            lines=lines[firsts][keep],
            max_token=meta["max_token"],
            last_tokens=frozenset(np.unique(tokens[ends - 1]).tolist()),
            n_dropped=int((~keep).sum()),
            n_bad=tuple(meta["n_bad"]),
            first_bad=meta["first_bad"],
        )


def _by_prompt(
    answers: np.ndarray, sources: np.ndarray, answer_tokens: np.ndarray, layout: AnswerLayout, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Answers of one source to one prompt, as many in a group as a pack has room for.

    Returns:
        int64 (N,) answers, group after group in the order of their first; int64 (G,) where each begins.
    """
    groups: list[list[int]] = []
    open_group: dict[tuple[int, int], tuple[int, int]] = {}  # (source, prompt) → group, its answers' tokens
    for i, (row, source, n_tokens) in enumerate(zip(answers, sources.tolist(), answer_tokens.tolist())):
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
