"""What the ranks found, compared: what is bad, and where. Measures nothing."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .device import Product
from .disk import Disk
from .host import Host
from .links import Link

SLOW = 1.5  # times slower than the median of its kind
MAX_SKEW = 1.0  # seconds between two clocks
LITTLE = 0.5  # of the median of nodes: free memory

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(frozen=True)
class Rank:
    """All that one rank found; `links` by axis."""

    host: Host
    product: Product
    links: Mapping[str, Link]
    disk: Disk


@dataclass(frozen=True)
class Finding:
    """Something bad, in words, and the nodes that it is about."""

    nodes: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{', '.join(self.nodes)}: {self.text}"


def judge(ranks: Sequence[Rank], room: int) -> list[Finding]:
    """What is bad, worst kinds first.

    Args:
        ranks: by rank.
        room: bytes that run_dir must have for a checkpoint and an export.
    """
    return [
        *_disks(ranks, room),
        *_versions(ranks),
        *_devices(ranks),
        *_speeds(ranks),
        *_links(ranks),
        *_clocks(ranks),
        *_memory(ranks),
    ]


def _finding(ranks: Sequence[Rank], numbers: Iterable[int], text: str) -> Finding:
    numbers = sorted(numbers)
    nodes = tuple(dict.fromkeys(ranks[number].host.name for number in numbers))
    return Finding(nodes, f"{_named(numbers)} {text}")


def _named(numbers: Sequence[int]) -> str:
    some = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"rank {some}" if len(numbers) == 1 else f"ranks {some}"


def _disks(ranks: Sequence[Rank], room: int) -> list[Finding]:
    refused: dict[str, list[int]] = defaultdict(list)
    for number, rank in enumerate(ranks):
        if rank.disk.refused:
            refused[rank.disk.refused].append(number)
    found = [_finding(ranks, numbers, f"cannot write run_dir: {why}") for why, numbers in refused.items()]
    blind = {number for number, rank in enumerate(ranks) if rank.disk.unseen and number}
    # Rank 0 sees no file of a rank that could not write any.
    blind |= {other for other in ranks[0].disk.unseen if not ranks[other].disk.refused}
    blind -= {number for numbers in refused.values() for number in numbers}
    if blind:
        found.append(
            _finding(
                ranks, blind, "and rank 0 do not see each other's files in run_dir; share it over all nodes"
            )
        )
    least = min(range(len(ranks)), key=lambda number: ranks[number].disk.free)
    if not refused and (free := ranks[least].disk.free) < room:
        found.append(
            _finding(
                ranks,
                [least],
                f"finds {free / 1e9:.1f} GB free in run_dir; a checkpoint and an export take {room / 1e9:.1f} GB",
            )
        )
    return found


def _versions(ranks: Sequence[Rank]) -> list[Finding]:
    found = []
    for name in dict.fromkeys(name for rank in ranks for name in rank.host.versions):
        having = _by(ranks, lambda rank, name=name: rank.host.versions.get(name, "none"))  # type: ignore[misc]
        usual = max(having, key=lambda value: len(having[value]))
        for value, numbers in having.items():
            if value != usual:
                found.append(_finding(ranks, numbers, f"has {name} {value}, and the others {usual}"))
    return found


def _devices(ranks: Sequence[Rank]) -> list[Finding]:
    found = []
    shared = _by(ranks, lambda rank: (rank.host.name, rank.host.device_id))
    for (_, device_id), numbers in shared.items():
        if device_id and len(numbers) > 1:
            found.append(_finding(ranks, numbers, "share one GPU; give each rank its own"))
    wavering = [number for number, rank in enumerate(ranks) if not rank.product.steady]
    if wavering:
        found.append(
            _finding(ranks, wavering, "multiplies the same matrices to different results; replace the device")
        )
    for device, numbers in _by(ranks, lambda rank: rank.host.device).items():
        results = Counter(ranks[number].product.digest for number in numbers)
        if len(results) == 1:
            continue
        (usual, most), (_, next_most) = results.most_common(2)
        if most == next_most:
            found.append(
                _finding(
                    ranks, numbers, f"multiply the same matrices to results that differ, each a {device}"
                )
            )
            continue
        wrong = [number for number in numbers if ranks[number].product.digest != usual]
        found.append(
            _finding(
                ranks, wrong, f"multiplies to another result than the other {most} of {device}; replace it"
            )
        )
    return found


def _speeds(ranks: Sequence[Rank]) -> list[Finding]:
    found = []
    for device, numbers in _by(ranks, lambda rank: rank.host.device).items():
        usual = statistics.median_high(ranks[number].product.tflops for number in numbers)
        slow = [number for number in numbers if ranks[number].product.tflops * SLOW < usual]
        for number in slow:
            own = ranks[number].product.tflops
            found.append(
                _finding(
                    ranks,
                    [number],
                    f"multiplies at {own:.3g} TFLOP/s, where {device} here reaches {usual:.3g}",
                )
            )
    return found


def _links(ranks: Sequence[Rank]) -> list[Finding]:
    found = []
    for axis in dict.fromkeys(axis for rank in ranks for axis in rank.links):
        groups = _by(ranks, lambda rank, axis=axis: rank.links[axis].ranks)  # type: ignore[misc]
        wrong = [number for number, rank in enumerate(ranks) if not rank.links[axis].right]
        if wrong:
            found.append(_finding(ranks, wrong, f"got wrong numbers over {axis}; look at its links"))
        # A group is as fast as its slowest member finds it.
        speed = {
            group: min(ranks[n].links[axis].gb_per_second for n in numbers)
            for group, numbers in groups.items()
        }
        usual = statistics.median_high(speed.values())
        for group, own in speed.items():
            if own * SLOW < usual:
                text = f"talk at {own:.3g} GB/s over {axis}, where the median of groups is {usual:.3g}"
                found.append(_finding(ranks, group, text))
    return found


def _clocks(ranks: Sequence[Rank]) -> list[Finding]:
    """Against the median clock, in the round where a rank was nearest to it: barriers are left a little apart."""
    rounds = list(zip(*(rank.host.clock for rank in ranks), strict=True))
    usual = [statistics.median_low(times) for times in rounds]
    found = []
    for name, numbers in _by(ranks, lambda rank: rank.host.name).items():
        apart = min(
            (time - middle for n in numbers for time, middle in zip(ranks[n].host.clock, usual)), key=abs
        )
        if abs(apart) > MAX_SKEW:
            way = "ahead of" if apart > 0 else "behind"
            text = f"its clock is {abs(apart):.1f} s {way} the median of nodes; let chrony or ntpd set it"
            found.append(Finding((name,), text))
    return found


def _memory(ranks: Sequence[Rank]) -> list[Finding]:
    free = {rank.host.name: rank.host.memory[0] for rank in ranks}
    usual = statistics.median_high(free.values())
    return [
        Finding(
            (name,),
            f"{own / 1e9:.0f} GB of memory are free, where the median of nodes has {usual / 1e9:.0f}; "
            "see what runs there",
        )
        for name, own in free.items()
        if own < LITTLE * usual
    ]


def _by(ranks: Sequence[Rank], key: Callable[[Rank], KeyT]) -> dict[KeyT, list[int]]:
    """Numbers of ranks by what they have in common."""
    found: dict[KeyT, list[int]] = defaultdict(list)
    for number, rank in enumerate(ranks):
        found[key(rank)].append(number)
    return dict(found)
