"""The mesh: process groups of a run, opened and closed. The only file that opens Megatron's parallel_state."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from paralign.models.mcore import parallel_state, tensor_parallel

from .layout import Layout


@dataclass(frozen=True)
class Mesh:
    """Where this process stands, and whom it talks to.

    Attributes:
        rank, world_size: among all processes.
        tp_rank, pp_rank, dp_rank: coordinates on the axes of the layout.
        tp_group, pp_group, dp_group: the groups along each axis through this rank.
        device: where tensors of this rank live.
    """

    layout: Layout
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: Any
    pp_group: Any
    dp_group: Any
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def send_to_copies(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` in all copies of the model by that of the first."""
        if self.layout.dp > 1:
            dist.broadcast(tensor, dist.get_process_group_ranks(self.dp_group)[0], group=self.dp_group)

    def sum_over_data_then_share(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel ranks of the last stage, then give every stage the result.

        Args:
            values: float64, of one shape everywhere; what other stages than the last pass in is overwritten.
        """
        if self.is_last_stage:
            dist.all_reduce(values, group=self.dp_group)
        if self.layout.pp > 1:
            dist.broadcast(values, dist.get_process_group_ranks(self.pp_group)[-1], group=self.pp_group)
        return values


def local_device(local_rank: int) -> torch.device:
    """The GPU of this local rank where there are any, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


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
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        store=store,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    yield store
    # Not after an error: it would wait for ranks that wait for this one.
    dist.destroy_process_group()


@contextmanager
def open_mesh(layout: Layout, *, local_rank: int, seed: int) -> Iterator[Mesh]:
    """Build the groups of a layout over the ranks of an open world.

    Megatron's order of ranks: tensor parallel innermost, then data parallel, then pipeline.
    """
    config = layout.config
    parallel_state.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )
    # Dropout and recompute draw from Megatron's own generators, one stream per tensor-parallel rank.
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    try:
        yield Mesh(
            layout=layout,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(),
            device=local_device(local_rank),
        )
    finally:
        tensor_parallel.get_cuda_rng_tracker().reset()
        parallel_state.destroy_model_parallel()
