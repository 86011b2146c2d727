"""What a set of samples comes to: lengths, packs, what is learned, source by source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .cache import TokenCache
from .epochs import Epochs

BAR_WIDTH = 40


@dataclass(frozen=True)
class SourceStatistics:
    """One source of a set.

    Attributes:
        samples, tokens, loss_tokens: of the samples that are left.
        seen: of these samples, how many an epoch takes, each counted as often as it is seen.
    """

    name: str
    path: Path
    weight: float
    samples: int
    tokens: int
    loss_tokens: int
    seen: int


@dataclass(frozen=True)
class SetStatistics:
    """One set of samples.

    Attributes:
        directory: of the cache.
        sources: in the recipe's order.
        histogram: (least length, greatest length, samples), lengths doubling.
        packs, steps: of the first epoch.
        utilisation: share of the rows of its packs that are real tokens.
        loss_share: share of these tokens that are learned.
        samples_per_pack: least, mean, greatest.
        left_out: why → how many samples.
    """

    name: str
    directory: Path
    sources: tuple[SourceStatistics, ...]
    histogram: tuple[tuple[int, int, int], ...]
    packs: int
    steps: int
    utilisation: float
    loss_share: float
    samples_per_pack: tuple[int, float, int]
    left_out: dict[str, int]
    first_bad: str

    def __rich__(self) -> RenderableType:
        table = Table(
            "source", "weight", "samples", "tokens", "learned", "seen an epoch", title_justify="left"
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for source in self.sources:
            table.add_row(
                Text(source.name),
                f"{source.weight:g}",
                f"{source.samples:,}",
                f"{source.tokens:,}",
                f"{source.loss_tokens / max(1, source.tokens):.1%}",
                f"{source.seen:,}",
            )
        least, mean, greatest = self.samples_per_pack
        most = max(count for *_, count in self.histogram)
        lines = [
            *(f"{'from' if i == 0 else '':<13}{source.path}" for i, source in enumerate(self.sources)),
            f"packs        {self.packs:,} in {self.steps:,} steps, {self.utilisation:.2%} of their rows real",
            f"learned      {self.loss_share:.1%} of the tokens of an epoch",
            f"in a pack    {mean:.1f} samples, {least} to {greatest}",
            *(f"left out     {count:,} {why}" for why, count in self.left_out.items() if count),
            *([f"the first    {self.first_bad}"] if self.first_bad else []),
            f"cache        {self.directory}",
            "tokens       samples",
            *(
                f"{low:>6,} – {high:<6,} {count:>9,} {'█' * round(BAR_WIDTH * count / most)}"
                for low, high, count in self.histogram
            ),
        ]
        return Group(Text(f"── {self.name}"), table, Text("\n".join(lines) + "\n"))


def set_statistics(name: str, cache: TokenCache, *, global_batch_size: int, seed: int) -> SetStatistics:
    """Counts a set, packed as its first epoch will be; see `Epochs`. A prompt with its answers is one sample."""
    epochs = Epochs(cache, global_batch_size=global_batch_size, seed=seed)
    plan = epochs.plan(0)
    seen = np.bincount(plan.sample_ids, minlength=len(cache))
    in_pack = np.diff(plan.offsets)
    n_tokens = int((seen * cache.lengths).sum())
    return SetStatistics(
        name=name,
        directory=cache.directory,
        sources=tuple(
            SourceStatistics(
                name=origin.name,
                path=origin.path,
                weight=origin.weight,
                samples=int(np.count_nonzero(here)),
                tokens=int(cache.lengths[here].sum()),
                loss_tokens=int(cache.n_loss[here].sum()),
                seen=int(seen[here].sum()),
            )
            for i, origin in enumerate(cache.origins)
            for here in [cache.sources == i]
        ),
        histogram=_histogram(cache.lengths),
        packs=len(plan),
        steps=epochs.first_step(1),
        utilisation=n_tokens / (len(plan) * cache.config.tokens_per_pack),
        loss_share=int((seen * cache.n_loss).sum()) / n_tokens,
        samples_per_pack=(int(in_pack.min()), float(in_pack.mean()), int(in_pack.max())),
        left_out={
            "too long": cache.n_dropped,
            "with nothing to learn": cache.n_skipped,
            "that cannot be read": sum(cache.n_bad),
            "cut to the length of a pack, and kept": cache.n_truncated,
        },
        first_bad=cache.first_bad,
    )


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Bins [2^k, 2^(k+1) − 1] from the shortest sample to the longest."""
    exponents = np.frexp(lengths)[1] - 1  # exact, unlike a logarithm
    first, last = int(exponents.min()), int(exponents.max())
    counts = np.bincount(exponents - first, minlength=last - first + 1)
    return tuple((1 << k, (2 << k) - 1, int(counts[k - first])) for k in range(first, last + 1))
