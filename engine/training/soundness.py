"""Whether a model's weights can be right: all of them finite, and the copies of one weight equal to the bit.

Both tests read the weights once. What is wrong is looked for only after that.
"""

from __future__ import annotations

import math
import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from paralign.models import rules_for
from paralign.models.errors import ParalignError
from paralign.models.weights import Rule

from ..parallel.mesh import Axis
from .model import Model
from .optim import Optimizer

SHOWN = 4  # of many tensors that are wrong, so many are told about
WORDS = 1024  # columns of a digest: two numbers that change places are noticed unless they lie in one column
_LOWEST = torch.iinfo(torch.int64).min
_ODD = -7046029254386353131  # 2^64 divided by the golden ratio: multiples of it differ in all bits


def not_finite(model: Model, dtype: torch.dtype | None = None) -> list[str]:
    """Tensors that hold a number that is infinite or none, in words; empty if all is well. Collective.

    Args:
        dtype: the one that the numbers must be finite in, such as an export's; by default their own.

    Returns:
        The same on every rank: Hugging Face names, how many numbers, the place of the first, and whose copy it is.
    """
    model.synchronize()
    named = [(name, weight.detach()) for name, weight in model.named_weights()]
    largest = torch.stack([torch.linalg.vector_norm(weight, math.inf).double() for _, weight in named])
    finite = torch.isfinite(largest if dtype is None else largest.to(dtype))
    if not model.mesh.largest(float(~finite.all())):
        return []
    rules = {rule.native: rule for rule in rules_for(model.arch)}
    mine = [
        fault
        for (name, weight), well in zip(named, finite.tolist())
        if not well
        for fault in _faults(rules[name], weight.to(dtype or weight.dtype), model.mesh.tp)
    ]
    ranks: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, faults in enumerate(model.mesh.gather(mine)):
        for fault in faults:
            ranks[fault].append(rank)
    return [f"{name} ({text}; {_names('rank', holders)})" for (name, text), holders in ranks.items()]


def refuse_not_finite(model: Model, place: object, remedy: str, kind: type[ParalignError]) -> None:
    """Raises an error of that kind, with place and remedy, if a weight is not finite; see `not_finite`."""
    if found := not_finite(model):
        raise kind(f"{place}: weights are not finite: {told(found)}; {remedy}")


def told(found: Sequence[str]) -> str:
    """The first of many, and how many more there are."""
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _faults(rule: Rule, shard: Tensor, tp: Axis) -> Iterator[tuple[str, str]]:
    """Hugging Face's name of each tensor that a share of a native one spoils, and what is wrong with it."""
    shard = shard.cpu()
    shares = [torch.zeros_like(shard) for _ in range(1 if rule.split is None else tp.size)]
    shares[0 if rule.split is None else tp.rank] = shard
    found = False
    for name, tensor in rule.join(shares).items():
        bad = ~torch.isfinite(tensor)
        if count := int(bad.sum()):
            found = True
            first = torch.unravel_index(bad.flatten().byte().argmax(), tensor.shape)
            place, value = [int(index) for index in first], tensor[first].item()
            yield name, f"{count:,} of {tensor.numel():,} numbers, the first {value} at {place}"
    if not found:
        yield rule.native, "in rows that pad the vocabulary"


@dataclass(frozen=True)
class Copy:
    """What one rank holds of a weight that others hold too.

    Attributes:
        rank, host: whose it is.
        digest: of its bits.
        wrong: numbers that are not the fp32 main weight's, rounded; None where there is no main weight.
    """

    rank: int
    host: str
    digest: int
    wrong: int | None = None


def copies_that_differ(model: Model, optimizer: Optimizer) -> list[str]:
    """Weights whose copies are not equal to the bit, in words; empty if all is well. Collective.

    Copies are those of data-parallel ranks, of tensor-parallel ranks where a tensor is not split, and of tied
    embeddings on the first and the last stage. It belongs between the backward pass and the update: the weights are
    whole then, and the main weights are what they were made of.

    Returns:
        The same on every rank: Hugging Face names, ranks, and which rank is wrong, if that can be told.
    """
    mesh = model.mesh
    rules = {rule.native: rule for rule in rules_for(model.arch)}
    named = [(rules[name], weight) for name, weight in model.named_weights()]
    digests = torch.stack([digest(weight) for _, weight in named])
    differ = _differ(digests, mesh.dp).any()
    whole = [i for i, (rule, _) in enumerate(named) if rule.split is None]
    if whole:
        differ |= _differ(digests[whole], mesh.tp).any()
    if model.arch.tied and mesh.pp.size > 1:
        tied = [i for i, (rule, _) in enumerate(named) if rule.native.startswith("embedding.")]
        # A stage between the first and the last has none, and takes part without a say.
        own = digests[tied] if tied else digests.new_full((1,), _LOWEST)
        differ |= _differ(own, mesh.pp, counts=bool(tied)).any()
    if not mesh.largest(float(differ)):
        return []
    return _judged(model, optimizer, named, digests.tolist())


def digest(tensor: Tensor) -> Tensor:
    """A number, int64 scalar, that two tensors of equal bits have in common: any one bit that differs changes it.

    One pass, and no copy of the tensor.
    """
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    n_words = raw.numel() // (4 * WORDS) * WORDS
    factors = (2 * torch.arange(4 * WORDS, device=raw.device) + 1) * _ODD
    words, rest = raw[: 4 * n_words].view(torch.int32).view(-1, WORDS), raw[4 * n_words :]
    # Sums of 32 bits that overflow lose nothing that a single bit can change.
    total = (words.sum(0, dtype=torch.int32).long() * factors[:WORDS]).sum()
    return total + (rest.long() * factors[: len(rest)]).sum()


def _differ(digests_N: Tensor, axis: Axis, *, counts: bool = True) -> Tensor:
    """bool (N,): which of these are not the same on all ranks of an axis."""
    if axis.size == 1:
        return torch.zeros_like(digests_N, dtype=torch.bool)
    both = torch.cat((digests_N, ~digests_N)) if counts else digests_N.repeat(2)
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=axis.group)
    highest_N, lowest_N = both.chunk(2)
    return highest_N != ~lowest_N


def _judged(
    model: Model, optimizer: Optimizer, named: Sequence[tuple[Rule, Tensor]], digests: Sequence[int]
) -> list[str]:
    """Which copies differ, and whose is wrong; all ranks ask the same questions in the same order."""
    mesh, host = model.mesh, socket.gethostname()
    # The same numbers have the same key: a share of a split tensor is another weight than its other shares.
    keys = [(rule.native, 0 if rule.split is None else mesh.tp.rank) for rule, _ in named]
    mine = [(key, Copy(mesh.rank, host, number)) for key, number in zip(keys, digests)]
    found: dict[tuple[str, int], list[Copy]] = defaultdict(list)
    for part in mesh.gather(mine):
        for key, copy in part:
            found[key].append(copy)
    unequal = [key for key, copies in found.items() if len({copy.digest for copy in copies}) > 1]
    mains = optimizer.main_weights()
    for key in unequal[:SHOWN]:
        i = keys.index(key) if key in keys else None
        wrong = None if i is None else _unlike_main(named[i][1], mains.get(named[i][1]), mesh.dp)
        counts = mesh.gather(wrong)
        found[key] = [Copy(copy.rank, copy.host, copy.digest, counts[copy.rank]) for copy in found[key]]
    names = {rule.native: " and ".join(rule.hf) for rule in rules_for(model.arch)}
    return [f"{names[key[0]]}: {verdict(found[key])}" for key in unequal[:SHOWN]] + [
        names[key[0]] for key in unequal[SHOWN:]
    ]


def _unlike_main(weight: Tensor, main: tuple[int, Tensor] | None, dp: Axis) -> int | None:
    """How many numbers of this rank's copy are not their owners' main weight, rounded; None for fp32. Collective.

    Args:
        main: the part that this rank owns, see `Optimizer.main_weights`, if it owns any.
    """
    if weight.dtype == torch.float32:
        return None
    expected = torch.zeros(weight.numel(), dtype=torch.int32, device=weight.device)
    if main is not None:
        start, part = main
        expected[start : start + part.numel()] = part.detach().to(weight.dtype).view(torch.int16).int()
    dist.all_reduce(expected, group=dp.group)  # each number has one owner
    return int((expected != weight.detach().reshape(-1).view(torch.int16).int()).sum())


def verdict(copies: Sequence[Copy]) -> str:
    """Which of several copies, not all equal, are wrong, and how that is known.

    The main weights decide where they tell copies apart; else more than half of the copies, if they are equal.
    """
    wrong, by = [copy for copy in copies if copy.wrong], "by the optimizer's main weights"
    if not 0 < len(wrong) < len(copies):
        (common, n_equal), *_ = Counter(copy.digest for copy in copies).most_common()
        wrong, by = (
            [copy for copy in copies if copy.digest != common],
            f"{n_equal} of {len(copies)} are equal",
        )
        if 2 * n_equal <= len(copies):
            return f"{_names('rank', map(_place, copies))} hold copies that differ, and nothing tells which is right"
    numbers = f" in {max(copy.wrong or 0 for copy in wrong):,} numbers" if any(c.wrong for c in wrong) else ""
    return f"the copy of {_names('rank', map(_place, wrong))} is wrong{numbers}, {by}"


def _place(copy: Copy) -> str:
    return f"{copy.rank} ({copy.host})"


def _names(what: str, names: Iterable[object]) -> str:
    texts = list(map(str, names))
    return f"{what}{'s' if len(texts) > 1 else ''} {', '.join(texts)}"
