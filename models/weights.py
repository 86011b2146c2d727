"""Rules that say how Hugging Face tensors become native ones.

A rule states one thing: which stretches of which Hugging Face tensors follow one another in the share of a
tensor-parallel rank. Slicing (import), joining (export), shapes and verification all derive from it. Moves
are exact, so that a round trip is bit-equal in any dtype. No model, process group or GPU is needed.

A whole tensor on its way between files is `Views`: views that follow one another along the first dimension,
so that nobody has to hold it in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .errors import WeightsError

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]  # a tensor by its Hugging Face name; best memory-mapped
Views = Iterable[Tensor]  # one tensor, cut along its first dimension; or flat blocks of it
BLOCK = 2**20  # elements that work on weights takes at a time: small enough for the processor's cache


class Piece(NamedTuple):
    """Indices `start:stop` along the split dimension of the Hugging Face tensor `rule.hf[source]`."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Rule:
    """One native tensor made of one Hugging Face tensor, whole on every rank or cut evenly along `split`.

    Subclasses make it of several, in another order, by stating other pieces.

    Attributes:
        native: Megatron's name; layers are numbered over the whole model, not within a pipeline stage.
        hf: Hugging Face's names.
        hf_shapes: one shape for each of `hf`.
        split: the dimension that tensor parallelism divides, or None if every rank holds the whole tensor.
    """

    native: str
    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    split: int | None = None
    _unit: ClassVar[str] = "rows or columns"

    @property
    def native_shape(self) -> Shape:
        """Shape of the whole native tensor, without padding."""
        return _resized(self.hf_shapes[0], self._dim, sum(shape[self._dim] for shape in self.hf_shapes))

    def shard_shape(self, tp_size: int) -> Shape:
        """Shape of the share of each rank, padding included.

        Raises:
            WeightsError: `tp_size` does not divide the tensor.
        """
        return _resized(self.native_shape, self._dim, self._extent(tp_size))

    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        """What follows one another along the split dimension in the share of `tp_rank`.

        Raises:
            WeightsError: `tp_size` does not divide the tensor.
        """
        extent = self._extent(tp_size)
        start = 0 if self.split is None else tp_rank * extent
        return [Piece(0, start, start + extent)]

    def slice(self, read: Read, tp_rank: int, tp_size: int) -> Tensor:
        """The share of one rank, contiguous, in the dtype that was read, on the device that was read from.

        Args:
            read: gives a tensor by its Hugging Face name; only the stretches that are used are touched.
            tp_rank, tp_size: tensor-parallel coordinate and degree.

        Raises:
            WeightsError: a tensor has another shape than the rule says, or `tp_size` does not divide it.
        """
        parts = self.parts(read, tp_rank, tp_size)
        missing = self._extent(tp_size) - sum(part.shape[self._dim] for part in parts)
        if missing:
            parts.append(parts[0].new_zeros(_resized(parts[0].shape, self._dim, missing)))
        return torch.cat(parts, self._dim)

    def parts(self, read: Read, tp_rank: int = 0, tp_size: int = 1) -> list[Tensor]:
        """The share of one rank, without padding, as views of what was read; by default the whole native tensor.

        Raises:
            WeightsError: a tensor has another shape than the rule says.
        """
        sources = [read(name) for name in self.hf]
        for name, source, expected in zip(self.hf, sources, self.hf_shapes):
            check_shape(name, source.shape, expected)
        return [sources[i].narrow(self._dim, a, b - a) for i, a, b in self.pieces(tp_rank, tp_size)]

    def hf_parts(self, native: Tensor) -> dict[str, list[Tensor]]:
        """The inverse of `parts`: Hugging Face tensors by name, as views of the whole native tensor.

        Raises:
            WeightsError: it has another shape than the rule says.
        """
        check_shape(self.native, native.shape, self.native_shape)
        found: list[list[tuple[int, Tensor]]] = [[] for _ in self.hf]
        for source, start, view in self._placed(native, 0, 1):
            found[source].append((start, view))
        ordered = [sorted(views, key=lambda view: view[0]) for views in found]
        return {name: [view for _, view in views] for name, views in zip(self.hf, ordered)}

    def join(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inverse of `slice`: Hugging Face tensors by name, from the shares of all ranks in rank order.

        Of a tensor that is not split, one copy is enough; if more are given they must be equal. A tensor that
        lies in one piece in the only share is a view of it.

        Raises:
            WeightsError: a share has another shape than the rule says, or copies of one tensor differ.
        """
        tp_size = len(shards)
        for shard in shards:
            check_shape(self.native, shard.shape, self.shard_shape(tp_size))
        if self.split is None:
            if not all(bit_equal(shards[0], shard) for shard in shards[1:]):
                raise WeightsError(
                    f"{self.native}: tensor-parallel ranks hold copies that differ; they must stay equal"
                )
            shards, tp_size = shards[:1], 1
        if tp_size == 1:
            found = self.hf_parts(shards[0])
            return {name: views[0] if len(views) == 1 else torch.cat(views) for name, views in found.items()}
        joined = [shards[0].new_empty(shape) for shape in self.hf_shapes]
        for tp_rank, shard in enumerate(shards):
            for source, start, view in self._placed(shard, tp_rank, tp_size):
                joined[source].narrow(self._dim, start, view.shape[self._dim]).copy_(view)
        return dict(zip(self.hf, joined))

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of each tensor, whole and without padding, under its name in either form."""
        return {self.native: self.native_shape, **dict(zip(self.hf, self.hf_shapes))}

    def _placed(self, share: Tensor, tp_rank: int, tp_size: int) -> Iterator[tuple[int, int, Tensor]]:
        """Views of a share: index into `hf`, where the view begins in that tensor, the view."""
        at = 0
        for source, start, stop in self.pieces(tp_rank, tp_size):
            yield source, start, share.detach().narrow(self._dim, at, stop - start)
            at += stop - start

    @property
    def _dim(self) -> int:
        return self.split or 0

    def _extent(self, tp_size: int) -> int:
        """Length of each rank's share along the split dimension."""
        size = self.native_shape[self._dim]
        return size if self.split is None else size // self._units * self._share(tp_size)

    @property
    def _units(self) -> int:
        """Of what each rank holds a whole number: rows, unless a subclass keeps some of them together."""
        return self.native_shape[self._dim]

    def _share(self, tp_size: int) -> int:
        """Units of each rank."""
        if self._units % tp_size:
            fitting = [str(n) for n in (1, 2, 4, 8, 16, 32, 64) if self._units % n == 0]
            raise WeightsError(
                f"{self.native}: {self._units} {self._unit} do not divide by tp {tp_size}; "
                f"tp {', '.join(fitting)} would do"
            )
        return self._units // tp_size


class Vocabulary(Rule):
    """A tensor with a row for each token, padded with rows of zeros to a multiple of the degree."""

    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        rows, share = self._units, self._share(tp_size)
        start = min(tp_rank * share, rows)
        return [Piece(0, start, min(start + share, rows))]

    def _share(self, tp_size: int) -> int:
        return -(-self._units // tp_size)


class GateUp(Rule):
    """Gate and up projections of SwiGLU: each rank holds its rows of the gate, then the same rows of up."""

    _unit: ClassVar[str] = "rows of gate and of up"

    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        share = self._share(tp_size)
        return [Piece(source, tp_rank * share, (tp_rank + 1) * share) for source in (0, 1)]

    @property
    def _units(self) -> int:
        return self.hf_shapes[0][0]


@dataclass(frozen=True)
class StackQKV(Rule):
    """q, k and v, by query group: the group's query heads, its key head, its value head.

    A degree above the groups cuts the same order of rows further: the ranks of a group gather its outputs
    in the forward pass (megatron-core's SelfAttention), so that no key row exists twice.

    Attributes:
        num_query_heads, num_query_groups: query heads, and key-value heads.
    """

    num_query_heads: int = 1
    num_query_groups: int = 1

    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        extent = self._extent(tp_size)
        first, end = tp_rank * extent, (tp_rank + 1) * extent
        group_rows = self.native_shape[0] // self.num_query_groups
        found = []
        for group in range(first // group_rows, -(-end // group_rows)):
            at = group * group_rows
            for piece in self._group(group):
                after = at + piece.stop - piece.start
                low, high = max(at, first), min(after, end)
                if low < high:
                    found.append(Piece(piece.source, piece.start + low - at, piece.start + high - at))
                at = after
        return found

    def _group(self, group: int) -> list[Piece]:
        """Where the rows of one group come from."""
        heights = [shape[0] // self.num_query_groups for shape in self.hf_shapes]
        return [Piece(i, group * height, (group + 1) * height) for i, height in enumerate(heights)]

    def _extent(self, tp_size: int) -> int:
        heads, groups, rows = self.num_query_heads, self.num_query_groups, self.native_shape[0]

        def fits(n: int) -> bool:
            return divides_heads(n, heads, groups) and rows % n == 0

        if not fits(tp_size):
            fitting = [str(n) for n in (1, 2, 4, 8, 16, 32, 64) if fits(n)]
            raise WeightsError(
                f"{self.native}: {heads} query heads in {groups} groups (key-value heads) do not divide by "
                f"tp {tp_size}; tp {', '.join(fitting)} would do"
            )
        return rows // tp_size


class SplitPackedQKV(StackQKV):
    """One Hugging Face tensor that holds all of q, then all of k, then all of v (Baichuan's W_pack)."""

    def _group(self, group: int) -> list[Piece]:
        head = self.hf_shapes[0][0] // (self.num_query_heads + 2 * self.num_query_groups)
        query = self.num_query_heads // self.num_query_groups * head
        first_key = self.num_query_heads * head
        first_value = first_key + self.num_query_groups * head
        return [
            Piece(0, group * query, (group + 1) * query),
            Piece(0, first_key + group * head, first_key + (group + 1) * head),
            Piece(0, first_value + group * head, first_value + (group + 1) * head),
        ]


def divides_heads(tp_size: int, num_query_heads: int, num_query_groups: int) -> bool:
    """Whether megatron-core's attention divides so: whole heads a rank, and whole groups or a part of one."""
    groups_fit = num_query_groups % tp_size == 0 or tp_size % num_query_groups == 0
    return num_query_heads % tp_size == 0 and groups_fit


def count_parameters(rules: Iterable[Rule]) -> int:
    """Parameters of the model that the rules describe, exact; a tied head counts once, padding not at all."""
    return sum(math.prod(rule.native_shape) for rule in rules)


def check_shape(name: str, found: Sequence[int], expected: Shape) -> None:
    """Raises WeightsError unless a tensor has the shape that the config calls for."""
    if tuple(found) != expected:
        raise WeightsError(
            f"{name}: found shape {tuple(found)}, expected {expected}; do config and weights belong together?"
        )


def bit_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; so NaN equals itself and 0.0 is not -0.0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    sides = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (left, right)]
    if all((side.numel() | side.storage_offset()) % 8 == 0 for side in sides):
        sides = [side.view(torch.int64) for side in sides]  # five times as fast as byte by byte
    return torch.equal(*sides)


def in_blocks(*sides: Views, elements: int = BLOCK) -> Iterator[tuple[Tensor, ...]]:
    """Flat pieces of at most `elements` at the same place of tensors of one size, however each is cut."""
    flat = [(part.reshape(-1) for part in side if part.numel()) for side in sides]
    rest: list[Tensor | None] = [next(parts, None) for parts in flat]
    while None not in rest:
        heads = [tensor for tensor in rest if tensor is not None]
        count = min(elements, *(head.numel() for head in heads))
        yield tuple(head[:count] for head in heads)
        rest = [
            head[count:] if head.numel() > count else next(parts, None) for head, parts in zip(heads, flat)
        ]
    if any(tensor is not None for tensor in rest):
        sizes = ", ".join(str(sum(part.numel() for part in side)) for side in sides)
        raise WeightsError(f"tensors of different sizes side by side: {sizes} elements; expected equal ones")


def _resized(shape: Sequence[int], dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])
