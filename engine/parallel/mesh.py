"""The mesh: process groups of a run, opened and closed. The only file that opens Megatron's parallel_state."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from paralign.models.errors import ParalignError
from paralign.models.mcore import initialize_model_parallel, parallel_state, tensor_parallel

from .layout import AXES, Layout
from .meeting import of_this_attempt

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis: `rank` of `size`, and the process group along it."""

    rank: int
    size: int
    group: Any


@dataclass(frozen=True)
class Mesh:
    """Where this process stands, and whom it talks to.

    Attributes:
        rank, world_size: among all processes.
        device: where tensors of this rank live.
        axes: this rank's place on each of the layout's AXES.
    """

    layout: Layout
    rank: int
    world_size: int
    device: torch.device
    axes: Mapping[str, Axis]

    @property
    def tp(self) -> Axis:
        return self.axes["tp"]

    @property
    def pp(self) -> Axis:
        return self.axes["pp"]

    @property
    def dp(self) -> Axis:
        return self.axes["dp"]

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def from_main(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; an error that it raises is raised on all of them. Collective."""
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made = [make(), None]
            except (ParalignError, OSError) as error:
                made = [None, error]
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        result: T = made[0]
        return result

    def gather(self, own: T) -> list[T]:
        """What each rank gives, by rank, on every rank. Collective."""
        found: list[T] = [own] * self.world_size
        dist.all_gather_object(found, own)
        return found

    def largest(self, number: float) -> float:
        """The largest of the numbers that the ranks give. Collective."""
        found = torch.tensor([float(number)], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.item()

    def send_to_copies(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` in all copies of the model by that of the first."""
        if self.dp.size > 1:
            dist.broadcast(tensor, group=self.dp.group, group_src=0)

    def sum_over_data_then_share(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel ranks of the last stage, then give every stage the result.

        Args:
            values: float64, the same shape on every rank. Only the last stage's values count.
        """
        if self.is_last_stage:
            dist.all_reduce(values, group=self.dp.group)
        if self.pp.size > 1:
            dist.broadcast(values, group=self.pp.group, group_src=self.pp.size - 1)
        return values


def local_device(local_rank: int) -> torch.device:
    """The GPU of this local rank where there are any, else the CPU.

    Of one that is shown alone, as by `srun --gpus-per-task=1`, the number is 0 in every rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)


@contextmanager
def open_world(
    *, rank: int, world_size: int, local_rank: int, timeout_minutes: int, store: Any = None
) -> Iterator[Any]:
    """Join the process group of all ranks, NCCL on GPUs and gloo elsewhere; leave it at the end.

    Args:
        store: where the ranks meet; None takes torch's, from MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE.

    Returns:
        The store.
    """
    device = local_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if store is None:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = of_this_attempt(store, rank, world_size, timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        store=store,
        timeout=timeout,
        # No device_id: with it every new group is a collective of all ranks on the GPU (ncclCommSplit), but a gloo
        # group one for those outside it alone, so that ranks are at different groups at the same time.
    )
    yield store
    # Not after an error: it would wait for ranks that wait for this one.
    dist.destroy_process_group()


@contextmanager
def open_mesh(layout: Layout, *, local_rank: int, seed: int) -> Iterator[Mesh]:
    """Build the groups of a layout over the ranks of an open world.

    Megatron's order of ranks is that of AXES.
    """
    config = layout.config
    initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )
    # Dropout and recompute draw from Megatron's own generators, one stream per tensor-parallel rank.
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
    }
    try:
        yield Mesh(
            layout,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=local_device(local_rank),
            axes={name: Axis(groups[name].rank(), groups[name].size(), groups[name]) for name in AXES},
        )
    finally:
        tensor_parallel.get_cuda_rng_tracker().reset()
        parallel_state.destroy_model_parallel()
