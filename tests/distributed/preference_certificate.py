"""Rows of the preference certificate, as a rank computes them: one layout, many objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from paralign.engine.batch import Column, Head, PackedBatch, StepBatch, Unit
from paralign.engine.columns.fillers import Baseline, KeptReference, put_reference, score_answers
from paralign.engine.config.model import ModelConfig
from paralign.engine.data.answers import AnswerLayout, Group, mismatch, rows_of
from paralign.engine.data.pack import pack_groups
from paralign.engine.objectives import Objective, build_objective
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import Mesh, open_mesh
from paralign.engine.training.model import Model
from paralign.engine.training.step import report, run_step
from paralign.models import arch_from_hf

from .certificate import _gather_gradients, _worst_gradient
from .preference_reference import PreferenceReference


@dataclass(frozen=True)
class PreferencePlan:
    """A packing: packs of indices of groups, in the order in which data-parallel ranks take their shares."""

    tokens_per_pack: int
    packs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PreferenceCase:
    """One objective on one plan; `name` is its row of the reference."""

    name: str
    config: Any
    share_prefix: bool
    groups: Sequence[Group]
    plan: PreferencePlan


@dataclass(frozen=True)
class PreferenceRow:
    """Errors against the reference, relative; `metrics` as the step reported them."""

    loss: float
    gradient: float
    worst_gradient: str
    metrics: Mapping[str, float]


def certify_preferences(
    rank: int,
    world_size: int,
    layout_keys: Mapping[str, Any],
    model_keys: Mapping[str, Any],
    reference_path: Path,
    cases: Sequence[PreferenceCase],
) -> list[PreferenceRow]:
    """The rows of `cases` at one layout; the model is built once for each kind of head."""
    reference: PreferenceReference = torch.load(reference_path, weights_only=False)
    lm_arch = arch_from_hf(reference.config)
    layout = resolve(
        LayoutConfig(**layout_keys), lm_arch, world_size=world_size, global_batch_size=8, tokens_per_pack=128
    )
    rows: dict[str, PreferenceRow] = {}
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        for head in {build_objective(case.config).head for case in cases}:
            arch = lm_arch.with_scalar_head() if head is Head.SCALAR else lm_arch
            section = ModelConfig(hf=Path(), dtype="fp32", **model_keys)
            model = Model.open(arch, mesh, section, reference.weights.__getitem__)
            model.prepare_to_train()
            for i, case in enumerate(cases):
                objective = build_objective(case.config)
                if objective.head is not head:
                    continue
                for chunk in model.chunks:
                    chunk.zero_grad_buffer()
                batch = preference_step(case, objective, reference, mesh)
                if Column.BASELINE in objective.needs:
                    Baseline(model).fill(batch)
                values = report(objective, run_step(model, batch, objective, train=True))
                _gather_gradients(model)
                worst = _worst_gradient(model, reference.gradients[case.name])
                worsts: list[Any] = [None] * world_size
                dist.all_gather_object(worsts, worst)
                error = abs(values["loss"] / reference.losses[case.name] - 1)
                rows[str(i)] = PreferenceRow(error, *max(worsts), values)
    return [rows[str(i)] for i in range(len(cases))]


def preference_step(
    case: PreferenceCase, objective: Objective, reference: PreferenceReference, mesh: Mesh
) -> StepBatch:
    """This rank's contiguous share of the packs, and, where a baseline is needed, of mismatched ones."""
    layout = AnswerLayout(objective.needs, objective.head, case.share_prefix)
    ref = None
    if Column.REF_LOGPROB in objective.needs:
        ref = reference.ref_logprobs["labelled" if case.name.startswith("kto") else "pairs"]
    packs = _share(case, case.plan.packs, case.groups, layout, mesh, ref)
    mismatched: list[PackedBatch] = []
    if Column.BASELINE in objective.needs:
        others = step_order(case)
        made = mismatch(others, case.plan.tokens_per_pack, layout)
        ref_kl = reference.ref_logprobs[f"{case.name} mismatched"]
        plan = first_fit([rows_of(group, layout) for group in made], case.plan.tokens_per_pack, 8)
        mismatched = _share(case, plan, made, layout, mesh, ref_kl)
    return StepBatch(
        micro_batches=packs,
        counts={
            Unit.PAIR: len(case.groups),
            Unit.SAMPLE: sum(len(group.answers) for group in case.groups),
            Unit.TOKEN: sum(_counted(group, layout) for group in case.groups),
        },
        n_samples=len(case.groups),
        n_tokens=0,
        sample_ids=(),
        mismatched=mismatched,
    )


def _counted(group: Group, layout: AnswerLayout) -> int:
    """Tokens that a likelihood of the first answer is averaged over, and its prompt's where they are learned."""
    if layout.labels_prompts:
        return len(group.prompt) + len(group.answers[0].tokens) - 1
    return int(np.count_nonzero(group.answers[0].weights))


def step_order(case: PreferenceCase) -> list[Group]:
    """The groups of the step in pack order."""
    return [case.groups[i] for pack in case.plan.packs for i in pack]


def first_fit(lengths: Sequence[int], tokens_per_pack: int, n_packs: int) -> tuple[tuple[int, ...], ...]:
    """Any packing will do here: each group goes into the first pack that has room."""
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    room = [tokens_per_pack] * n_packs
    for i, length in enumerate(lengths):
        k = next(k for k in range(n_packs) if room[k] >= length)
        packs[k].append(i)
        room[k] -= length
    return tuple(map(tuple, packs))


def _share(
    case: PreferenceCase,
    packs: Sequence[Sequence[int]],
    groups: Sequence[Group],
    layout: AnswerLayout,
    mesh: Mesh,
    ref: np.ndarray | None,
) -> list[PackedBatch]:
    share = len(packs) // mesh.dp.size
    made = [
        pack_groups([groups[i] for i in pack], case.plan.tokens_per_pack, mesh.device, layout)
        for pack in packs[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]
    ]
    if ref is not None:
        put_reference(made, torch.from_numpy(ref))
    return made


def first_loss(
    rank: int,
    world_size: int,
    layout_keys: Mapping[str, Any],
    reference_path: Path,
    case: PreferenceCase,
) -> tuple[float, float]:
    """DPO's loss of an untrained policy, its own reference: computed beforehand in another plan, and online."""
    reference: PreferenceReference = torch.load(reference_path, weights_only=False)
    arch = arch_from_hf(reference.config)
    layout = resolve(
        LayoutConfig(**layout_keys), arch, world_size=world_size, global_batch_size=8, tokens_per_pack=128
    )
    objective = build_objective(case.config)
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        section = ModelConfig(hf=Path(), dtype="fp32")
        model = Model.open(arch, mesh, section, reference.weights.__getitem__)
        n_answers = 2 * len(case.groups)
        other_plan = replace(case.plan, packs=case.plan.packs[::-1])
        untold = replace(reference, ref_logprobs={"pairs": np.zeros(n_answers)})
        packs = preference_step(replace(case, plan=other_plan), objective, untold, mesh).micro_batches
        cached = score_answers(model, [packs], n_answers)
        losses = []
        for ref in (cached, None):
            told = replace(reference, ref_logprobs={"pairs": np.zeros(n_answers) if ref is None else ref})
            batch = preference_step(case, objective, told, mesh)
            if ref is None:
                KeptReference(model).fill(batch)
            losses.append(report(objective, run_step(model, batch, objective, train=False))["loss"])
    return losses[0], losses[1]
