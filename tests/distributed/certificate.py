"""One row of the layout certificate, as a rank computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paralign.engine.batch import PackedBatch, StepBatch, Unit
from paralign.engine.config.model import ModelConfig
from paralign.engine.config.optimizer import OptimizerConfig
from paralign.engine.data.pack import pack_chats
from paralign.engine.objectives import OBJECTIVES
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import Mesh, open_mesh
from paralign.engine.training.model import Model
from paralign.engine.training.optim import Optimizer
from paralign.engine.training.step import run_step
from paralign.models import arch_from_hf, rules_for

from .reference import BETAS, CLIP, EPS, LR, STEPS, WEIGHT_DECAY, Reference, Sample


@dataclass(frozen=True)
class Plan:
    """A fixed packing: packs of sample ids, in the order in which data-parallel ranks take their shares."""

    name: str
    tokens_per_pack: int
    packs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """A layout, the files of its reference, and a packing."""

    world_size: int
    layout: Mapping[str, Any]
    model: Mapping[str, Any]
    reference: Path
    samples: Sequence[Sample] = field(repr=False)
    plan: Plan


@dataclass(frozen=True)
class Row:
    """Relative errors against the reference; `worst_gradient` names its parameter."""

    loss: float
    gradient: float
    worst_gradient: str
    grad_norm: float
    loss_after: float


def step_batch(case: Case, mesh: Mesh) -> StepBatch:
    """This rank's contiguous share of the packs."""
    share = len(case.plan.packs) // mesh.dp.size
    mine = case.plan.packs[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]
    packs: list[PackedBatch] = [
        pack_chats([case.samples[i] for i in ids], case.plan.tokens_per_pack, mesh.device) for ids in mine
    ]
    return StepBatch(
        micro_batches=packs,
        counts={Unit.TOKEN: sum(sum(mask[1:]) for _, mask in case.samples)},
        n_samples=len(case.samples),
        n_tokens=sum(len(tokens) for tokens, _ in case.samples),
        sample_ids=tuple(range(len(case.samples))),
    )


def certify(rank: int, world_size: int, case: Case) -> Row:
    reference: Reference = torch.load(case.reference, weights_only=False)
    arch = arch_from_hf(reference.config)
    layout = resolve(
        LayoutConfig(**case.layout),
        arch,
        world_size=world_size,
        global_batch_size=len(case.plan.packs),
        tokens_per_pack=case.plan.tokens_per_pack,
    )
    objective = OBJECTIVES["sft"]()
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        section = ModelConfig(hf=Path(), dtype="fp32", **case.model)
        model = Model.open(arch, mesh, section, reference.weights.__getitem__)
        model.prepare_to_train()
        optimizer = Optimizer(
            model.chunks,
            OptimizerConfig(
                lr=LR,
                lr_decay_style="constant",
                lr_warmup_steps=0,
                weight_decay=WEIGHT_DECAY,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                adam_eps=EPS,
                clip_grad=CLIP,
            ),
            layout,
            torch.float32,
        )
        losses, norms = [], []
        worst = (0.0, "")
        for step in range(STEPS):
            optimizer.zero_grad()
            sums = run_step(model, step_batch(case, mesh), objective, train=True)
            losses.append((sums[0, 0] / sums[0, 1]).item())
            if step == 0:
                _gather_gradients(model)
                worst = _worst_gradient(model, reference.gradients)
            norms.append(optimizer.step(LR).grad_norm)
        model.synchronize()
        sums = run_step(model, step_batch(case, mesh), objective, train=False)
        losses.append((sums[0, 0] / sums[0, 1]).item())
        worsts: list[Any] = [None] * world_size
        dist.all_gather_object(worsts, worst)
    gradient, name = max(worsts)
    return Row(
        loss=abs(losses[0] / reference.losses[0] - 1),
        gradient=gradient,
        worst_gradient=name,
        grad_norm=abs(norms[0] / reference.grad_norm - 1),
        loss_after=max(abs(a / b - 1) for a, b in zip(losses, reference.losses)),
    )


def _gather_gradients(model: Model) -> None:
    """Undo the scattering over data-parallel ranks, so that `main_grad` is whole on each."""
    mesh = model.mesh
    if mesh.dp.size == 1:
        return
    for chunk in model.chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(mesh.dp.size))
                mine = shards[mesh.dp.rank].clone()
                dist.all_gather(shards, mine, group=mesh.dp.group)


def _worst_gradient(model: Model, gradients: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest error relative to the largest entry of the reference's gradient, over this rank's parameters."""
    rules = {rule.native: rule for rule in rules_for(model.arch)}
    worst = (0.0, "")
    for name, parameter in model.named_weights():
        rule: Any = rules[name]
        expected = rule.slice(gradients.__getitem__, model.mesh.tp.rank, model.mesh.tp.size)
        scale = max(gradients[n].abs().max().item() for n in rule.hf)
        error = (parameter.main_grad - expected).abs().max().item() / scale  # type: ignore[attr-defined]
        worst = max(worst, (error, name))
    return worst
