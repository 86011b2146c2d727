"""All checks on the ranks of an open world, and the table that rank 0 shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from rich.table import Table

from paralign.models import parameter_count
from paralign.models.arch import Arch

from ...checkpoint.state_bytes import state_bytes
from ...parallel.mesh import Mesh
from . import device, disk, host, links
from .verdict import Finding, Rank, judge


def examine(mesh: Mesh, run_dir: Path, local_rank: int, room: int) -> tuple[list[Rank], list[Finding]]:
    """What every rank found, by rank, and what is bad of it. Collective; the same on every rank.

    Args:
        room: bytes that run_dir must have.
    """
    mine = Rank(
        host=host.look(local_rank, mesh.device),
        product=device.multiply(mesh.device),
        links=links.measure(mesh),
        disk=disk.look(run_dir),
    )
    every: list[Rank] = [mine] * mesh.world_size
    dist.all_gather_object(every, mine)
    return every, judge(every, room)


def bytes_of_a_save(arch: Arch, *, trained_in_bf16: bool) -> int:
    """Of a checkpoint and an export."""
    weight = 2 if trained_in_bf16 else 4
    return int(parameter_count(arch) * weight + state_bytes(parameter_count(arch), dp=1, weight=weight).disk)


def table(ranks: Sequence[Rank]) -> Table:
    """A row for each node."""
    axes = list(dict.fromkeys(axis for rank in ranks for axis in rank.links))
    shown = Table("node", "ranks", "device", "TFLOP/s", *(f"{axis} GB/s" for axis in axes), box=None)
    shown.add_column("memory free")
    shown.add_column("run_dir free")
    for name in dict.fromkeys(rank.host.name for rank in ranks):
        numbers = [number for number, rank in enumerate(ranks) if rank.host.name == name]
        here = [ranks[number] for number in numbers]
        shown.add_row(
            name,
            f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]),
            here[0].host.device,
            f"{min(rank.product.tflops for rank in here):.3g}",
            *(f"{min(rank.links[axis].gb_per_second for rank in here):.3g}" for axis in axes),
            f"{here[0].host.memory[0] / 1e9:.0f} of {here[0].host.memory[1] / 1e9:.0f} GB",
            f"{min(rank.disk.free for rank in here) / 1e9:.1f} GB",
        )
    return shown
