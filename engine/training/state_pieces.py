"""The optimizer's fp32 state as pieces of whole tensors: any layout loads what any layout saved, and nobody gathers.

A data-parallel rank has a flat range of each parameter of its model-parallel rank. A flat range of a matrix is at
most three rectangles: the end of a row, whole rows, the beginning of a row. As such each rank writes its own range,
and reads it straight into its place. megatron-core gathers each parameter on a rank instead, which then writes and
reads 12 bytes for each of them; names and shapes in a checkpoint are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor

from paralign.models.mcore import (
    DistributedOptimizer,
    ShardedTensor,
    ShardedTensorFactory,
    nested_values,
    nothing_collected,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


class StateInPieces(DistributedOptimizer):
    """Megatron's distributed optimizer, whose `fully_reshardable` state is views of what it holds."""

    def sharded_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """megatron-core's; what it would collect is left of its gather."""
        with nothing_collected():
            return super().sharded_state_dict(*arguments, **options)

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
    ) -> dict[str, ShardedTensor]:
        """The pieces of this rank, by a name of no meaning to others; loading fills them."""
        del is_loading, metadata
        of_parameter = {
            entry.data: entry
            for entry in nested_values(model_sharded_state_dict)
            if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        }
        pieces: list[ShardedTensor] = []
        for parameter in self.model_param_gbuf_map:
            start = self._get_model_param_range_map(parameter)["param"].start
            held = self._get_main_param_and_optimizer_states(parameter)
            for name in ("param", *MOMENTS):
                pieces += pieces_of(of_parameter[parameter], f"optimizer.state.{name}.", held[name], start)
        return {str(number): piece for number, piece in enumerate(pieces)}

    def load_parameter_state_from_fully_reshardable(self, state_dict: Any) -> None:
        """What was read is in its place; `step` is not part of it."""
        del state_dict
        for parameter in self.model_param_gbuf_map:
            held = self._get_main_param_and_optimizer_states(parameter)
            self._set_main_param_and_optimizer_states(parameter, held)


def pieces_of(
    whole: ShardedTensor | ShardedTensorFactory, prefix: str, held: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """A flat range of a parameter as pieces of the tensors that the parameter is saved as.

    Args:
        whole: where this rank's share of the parameter lies in them; a fused one lies in several places.
        prefix: before their names.
        held: (N,) values for the range, in any dtype.
        start: of the range in the flat share.
    """
    for part in whole.build() if isinstance(whole, ShardedTensorFactory) else [whole]:
        first = part.data.storage_offset() - whole.data.storage_offset() - start
        row = part.data.stride(0)
        for low, high in row_ranges(max(-first, 0), min(held.numel() - first, part.data.numel()), row):
            shape = (max((high - low) // row, 1), min(high - low, row))[: part.data.dim()]
            offset = (low // row, low % row)[: part.data.dim()]
            data = held.detach()[first + low : first + high].view(shape)
            yield ShardedTensor(
                prefix + part.key,
                data,
                data.dtype,
                data.shape,
                part.global_shape,
                tuple(there + here for there, here in zip(part.global_offset, offset, strict=True)),
                axis_fragmentations=None,
                replica_id=(*part.replica_id[:2], 0),  # the copies of the model have other ranges
                allow_shape_mismatch=part.allow_shape_mismatch,
            )


def row_ranges(low: int, high: int, row: int) -> list[tuple[int, int]]:
    """A flat range cut into the rest of a row, whole rows, and the beginning of one; those that are not empty."""
    whole_from = min(-(-low // row) * row, high)
    whole_to = max(high // row * row, whole_from)
    cuts = [low, whole_from, whole_to, high]
    return [(a, b) for a, b in pairwise(cuts) if a < b]
