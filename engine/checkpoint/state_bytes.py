"""Bytes of a training state, and what each rank holds and moves of it; held against a run by tests/distributed."""

from __future__ import annotations

from dataclasses import dataclass

OPTIMIZER = 12  # bytes a parameter: the fp32 weight and two fp32 moments


@dataclass(frozen=True)
class StateBytes:
    """Of one rank. A save and a load move the same bytes between it and the disk.

    Attributes:
        disk: written by a save; read by a load, in fp32 without the weights, which the optimizer has.
        host: copied before an asynchronous save writes; a load holds 16 MiB at a time.
        received: weights that other copies of the model have read, at a load.
    """

    disk: float
    host: float
    received: float


def state_bytes(parameters: int, *, dp: int, weight: int) -> StateBytes:
    """For a rank that holds so many parameters, of `weight` bytes each, where `dp` copies of the model train.

    Copies share the work evenly, but for what does not divide: weights are dealt out tensor by tensor.
    """
    share = parameters / dp
    return StateBytes(
        disk=share * (OPTIMIZER + weight),
        host=share * (OPTIMIZER + weight),
        received=(parameters - share) * weight,
    )
