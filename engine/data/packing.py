"""Which samples share a pack: best-fit decreasing, part by part.

Best-fit decreasing takes the longest sample first and puts it where the least room is left over. Samples of
one length are alike, and so are bins with as much room left, so whole groups are placed at a time: thousands
of operations instead of one per sample, for the very packing that one by one would give.

Over all samples at once it puts the same ones together in every epoch, but for those of one length. So each epoch
deals the samples into parts at random, and fits part after part into the bins as they are by then: two samples meet
again where one part has both of them, and the room that a part leaves is filled by those behind it.

N samples, P packs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

PLAIN, MIXED = 1, 2  # versions of a plan: all samples at once, as older runs have it; in parts
PARTS = (16, 8, 4, 2, 1)  # so many, or fewer where they would cost packs
FULL = 0.99  # of all rows are real tokens, or packs are as few as at once, give or take
SPARE = 0.005  # of them


@dataclass(frozen=True)
class PackPlan:
    """The packs of an epoch, in the order they are trained on.

    Attributes:
        sample_ids: int64 (N,), the samples, pack after pack.
        offsets: int64 (P+1,), where each pack begins in `sample_ids`.
    """

    sample_ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, i: int) -> np.ndarray:
        """int64, the samples of pack i."""
        return self.sample_ids[self.offsets[i] : self.offsets[i + 1]]


def plan_packs(
    lengths: np.ndarray, tokens_per_pack: int, *, seed: int, epoch: int, version: int = MIXED
) -> PackPlan:
    """Every sample in exactly one pack.

    (seed, epoch) decide the order of the packs and who shares one. Epochs differ by a few packs; those of a `PLAIN`
    plan have as many each.

    Args:
        lengths: int64 (N,), tokens of each sample, from 1 to tokens_per_pack.
        version: `PLAIN` for the plan that older runs began with.

    Raises:
        ValueError: a length outside that range.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= tokens_per_pack:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}; expected 1 to {tokens_per_pack}")
    draw = np.random.default_rng((seed, epoch))
    shuffled = draw.permutation(len(lengths))
    enough = int(lengths.sum()) / (FULL * tokens_per_pack)
    for n_parts in PARTS if version == MIXED else (1,):
        parts = np.array_split(shuffled, n_parts)
        bin_of, n_bins = _best_fit([np.bincount(lengths[part]) for part in parts], tokens_per_pack)
        if n_bins > enough and n_parts == PARTS[0]:
            at_once = _best_fit([np.bincount(lengths, minlength=1)], tokens_per_pack)[1]
            enough = max(enough, at_once * (1 + SPARE))
        if n_bins <= enough:
            break
    longest_first = tokens_per_pack - lengths
    ids = np.concatenate([part[_order(longest_first[part])] for part in parts])  # equals at random
    pack_of = draw.permutation(n_bins)[bin_of]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(pack_of, minlength=n_bins))))
    return PackPlan(ids[_order(pack_of)], offsets)


def _order(keys: np.ndarray) -> np.ndarray:
    """What sorts numbers from 0 to 2³² − 1, equals as they stand; numpy sorts 16 bits at a time without comparing."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if keys.max(initial=0) < 1 << 16:
        return order
    return order[np.argsort((keys >> 16)[order].astype(np.uint16), kind="stable")]


def _best_fit(parts: Sequence[np.ndarray], room: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing over parts, in each `counts[l]` samples of length l, into bins of `room`.

    Bins with the same room left are kept as intervals of bin numbers; `rooms` are these rooms in order, so that the
    tightest fit is one search away.

    Returns:
        int64 (N,), the bin of each sample, part by part and longest first; and the number of bins.
    """
    bins_with: dict[int, list[tuple[int, int]]] = {}  # room left → intervals (first bin, number of bins)
    rooms: list[int] = []
    n_bins = 0
    placed: list[tuple[int, int, int]] = []  # (first bin, number of bins, samples in each), longest first

    def put(first: int, number: int, left: int) -> None:
        if left in bins_with:
            bins_with[left].append((first, number))
        elif left:
            bins_with[left] = [(first, number)]
            insort(rooms, left)

    longest_first = [np.flatnonzero(counts)[::-1] for counts in parts]
    for length, waiting in chain.from_iterable(
        zip(lengths.tolist(), counts[lengths].tolist()) for lengths, counts in zip(longest_first, parts)
    ):
        while waiting:
            tightest = bisect_left(rooms, length)
            if tightest < len(rooms):
                left = rooms[tightest]
                first, number = bins_with[left].pop()
                if not bins_with[left]:
                    del bins_with[left], rooms[tightest]
            else:
                left, first, number = room, n_bins, -(-waiting // (room // length))
                n_bins += number
            # The tightest bin stays the tightest while another sample of this length fits into it, so each
            # bin is filled before the next is touched, and at most one is filled in part.
            each = left // length
            full = min(number, waiting // each)
            if full:
                placed.append((first, full, each))
                put(first, full, left - each * length)
                waiting -= full * each
            if full < number:
                first, number = first + full, number - full
                if waiting:
                    rest = min(waiting, each)
                    placed.append((first, 1, rest))
                    put(first, 1, left - rest * length)
                    waiting -= rest
                    first, number = first + 1, number - 1
                if number:
                    put(first, number, left)

    firsts, numbers, samples = np.array(placed, dtype=np.int64).reshape(-1, 3).T
    before = np.cumsum(numbers) - numbers
    bins = np.arange(numbers.sum()) - np.repeat(before - firsts, numbers)
    return np.repeat(bins, np.repeat(samples, numbers)), n_bins
