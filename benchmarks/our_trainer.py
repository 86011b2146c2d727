"""One rank of our own trainer on a geometry with random weights, for benchmarks of one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from step_peers import SETTINGS
from step_workload import BETA, LR, Geometry, Pack, n_learned
from torch import Tensor

from paralign.engine.backends import backend_of
from paralign.engine.batch import Head, PackedBatch, StepBatch, Unit
from paralign.engine.columns.fillers import KeptReference
from paralign.engine.config.model import ModelConfig
from paralign.engine.data.answers import AnswerLayout, Group
from paralign.engine.data.pack import pack_chats
from paralign.engine.objectives import Objective
from paralign.engine.objectives.dpo import DPO, DPOConfig
from paralign.engine.parallel.layout import Layout, LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.training.build import DTYPES, random_weights
from paralign.engine.training.model import Model
from paralign.engine.training.optim import Optimizer
from paralign.engine.training.step import report, run_step
from paralign.models import arch_from_hf

Kernels = Literal["auto", "reference"]


@dataclass
class OurTrainer:
    """A model that learns; `reference`, of the same weights, is there if it was asked for."""

    model: Model
    optimizer: Optimizer
    reference: KeptReference | None

    def step(self, batch: StepBatch, objective: Objective) -> float:
        """Forward, backward, clipping, AdamW; the loss."""
        self.optimizer.zero_grad()
        sums: Tensor = run_step(self.model, batch, objective, train=True)
        self.optimizer.step(LR)
        return report(objective, sums)["loss"]


def one_rank_layout(geometry: Geometry, n_packs: int) -> Layout:
    """Of a step of so many packs."""
    keys = LayoutConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    sizes = {"global_batch_size": n_packs, "tokens_per_pack": geometry.tokens_per_pack}
    return resolve(keys, arch_from_hf(geometry.config()), world_size=1, **sizes)


@contextmanager
def our_trainer(
    geometry: Geometry, n_packs: int, dtype: str, kernels: Kernels = "auto", *, reference: bool = False
) -> Iterator[OurTrainer]:
    """In an open world of one rank."""
    arch = arch_from_hf(geometry.config())
    layout = one_rank_layout(geometry, n_packs)
    section = ModelConfig(hf=Path(), dtype=dtype, kernels=kernels)  # type: ignore[arg-type]
    with open_mesh(layout, local_rank=0, seed=0) as mesh:
        precision = DTYPES[dtype]
        read = random_weights(arch, seed=0, dtype=precision, device=mesh.device)
        kept = KeptReference(Model.open(arch, mesh, section, read)) if reference else None
        model = Model.open(arch, mesh, section, read)
        model.prepare_to_train()
        fused = backend_of(section).fuses_updates
        yield OurTrainer(model, Optimizer(model.chunks, SETTINGS, layout, precision, fused=fused), kept)


def sft_batch(packs: list[Pack], tokens_per_pack: int, device: torch.device) -> StepBatch:
    """A step of these packs."""
    made: list[PackedBatch] = [pack_chats(pack, tokens_per_pack, device) for pack in packs]
    return StepBatch(made, {Unit.TOKEN: n_learned(packs)}, sum(map(len, packs)), 0, ())


def dpo_objective() -> DPO:
    """As the DPO mix of preference.py has it."""
    return DPO(DPOConfig(name="dpo", beta=BETA))


def dpo_batch(
    pairs: Sequence[Group],
    pack: Callable[[Sequence[Group], AnswerLayout], list[PackedBatch]],
    *,
    share_prefix: bool,
) -> StepBatch:
    """A step of these pairs, packed by `pack`."""
    layout = AnswerLayout(dpo_objective().needs, Head.LM, share_prefix=share_prefix)
    return StepBatch(pack(pairs, layout), {Unit.PAIR: len(pairs), Unit.TOKEN: 1}, len(pairs), 0, ())
