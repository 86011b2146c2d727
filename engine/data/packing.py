"""Which samples share a pack: best-fit decreasing.

Best-fit decreasing takes the longest sample first and puts it where the least room is left over. Samples of
one length are alike, and so are bins with as much room left, so whole groups are placed at a time: thousands
of operations instead of one per sample, for the very packing that one by one would give.

N samples, P packs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


def plan_packs(lengths: np.ndarray, tokens_per_pack: int, *, seed: int, epoch: int) -> PackPlan:
    """Every sample in exactly one pack.

    The number of packs depends on the lengths alone. (seed, epoch) decide the order of the packs, and which
    of the samples of one length goes where.

    Args:
        lengths: int64 (N,), tokens of each sample, from 1 to tokens_per_pack.

    Raises:
        ValueError: a length outside that range.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= tokens_per_pack:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}; expected 1 to {tokens_per_pack}")
    draw = np.random.default_rng((seed, epoch))
    shuffled = draw.permutation(len(lengths))
    ids = shuffled[np.argsort(-lengths[shuffled], kind="stable")]  # longest first, equals at random
    bin_of, n_bins = _best_fit(np.bincount(lengths, minlength=1), tokens_per_pack)
    pack_of = draw.permutation(n_bins)[bin_of]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(pack_of, minlength=n_bins))))
    return PackPlan(ids[np.argsort(pack_of, kind="stable")], offsets)


def _best_fit(counts: np.ndarray, room: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing over `counts[l]` samples of length l, into bins of `room`.

    Bins with the same room left are kept as intervals of bin numbers; `open_rooms` has bit r set while there
    is a bin with room r, so that the tightest fit is one shift away.

    Returns:
        int64 (N,), the bin of each sample, longest first; and the number of bins.
    """
    bins_with: dict[int, list[tuple[int, int]]] = {}  # room left → intervals (first bin, number of bins)
    open_rooms = 0
    n_bins = 0
    placed: list[tuple[int, int, int]] = []  # (first bin, number of bins, samples in each), longest first

    def put(first: int, number: int, left: int) -> None:
        nonlocal open_rooms
        if number and left:
            bins_with.setdefault(left, []).append((first, number))
            open_rooms |= 1 << left

    for length in np.flatnonzero(counts)[::-1].tolist():
        waiting = int(counts[length])
        while waiting:
            fitting = open_rooms >> length
            if fitting:
                left = length + (fitting & -fitting).bit_length() - 1
                first, number = bins_with[left].pop()
                if not bins_with[left]:
                    open_rooms ^= 1 << left
            else:
                left, first, number = room, n_bins, -(-waiting // (room // length))
                n_bins += number
            # The tightest bin stays the tightest while another sample of this length fits into it, so each
            # bin is filled before the next is touched, and at most one is filled in part.
            each = left // length
            full = min(number, waiting // each)
            rest = min(waiting - full * each, each) if full < number else 0
            if full:
                placed.append((first, full, each))
                put(first, full, left - each * length)
            if rest:
                placed.append((first + full, 1, rest))
                put(first + full, 1, left - rest * length)
            put(first + full + bool(rest), number - full - bool(rest), left)
            waiting -= full * each + rest

    firsts, numbers, samples = np.array(placed, dtype=np.int64).reshape(-1, 3).T
    before = np.cumsum(numbers) - numbers
    bins = np.arange(numbers.sum()) - np.repeat(before - firsts, numbers)
    return np.repeat(bins, np.repeat(samples, numbers)), n_bins
