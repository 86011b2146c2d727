"""A model lends its place and gets it back to the bit, and hands on its tensors in buckets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from paralign.engine.columns.fillers import LOGPROBS, VALUES
from paralign.engine.config.model import ModelConfig
from paralign.engine.config.optimizer import OptimizerConfig
from paralign.engine.objectives import OBJECTIVES
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.training.build import DTYPES, random_weights
from paralign.engine.training.model import Model
from paralign.engine.training.optim import Optimizer
from paralign.engine.training.step import run_step
from paralign.models import arch_from_hf, parameter_count, rules_for
from paralign.models.head_read import Quantity

from .certificate import Case, step_batch
from .pool import RankPool
from .reference import SAMPLES, tiny_model
from .test_certificate import LAYOUTS, OVERLAP, PLANS

PLAN = PLANS["8 packs of 96, in order"]
SETTINGS = OptimizerConfig(lr=1e-2, lr_decay_style="constant", lr_warmup_steps=0, weight_decay=0.1)
CASES: dict[str, tuple[int, dict[str, Any], str, str]] = {
    # In fp32 the optimizer's main weights are views of the buffer that holds the model's.
    "DP2, overlap, fp32": (2, {**LAYOUTS["DP2"][1], **OVERLAP}, "fp32", "llama"),
    "DP2, overlap, bf16": (2, {**LAYOUTS["DP2"][1], **OVERLAP}, "bf16", "llama"),
    "PP2×VPP2, tied, fp32": (2, dict(LAYOUTS["PP2×VPP2"][1]), "fp32", "qwen2"),
    "TP2×PP2×DP2+SP, tied, bf16": (8, {**LAYOUTS["TP2×PP2×DP2+SP"][1], **OVERLAP}, "bf16", "qwen2"),
}


def _bits(model: Model, optimizer: Optimizer) -> list[Tensor]:
    """Copies of the weights, and of what the optimizer updates."""
    mains = [main for group in optimizer.megatron.param_groups for main in group["params"]]
    return [tensor.detach().clone() for tensor in (*(weight for _, weight in model.named_weights()), *mains)]


def lend_between_steps(
    rank: int, world_size: int, keys: dict[str, Any], dtype: str, family: str
) -> list[list[float]]:
    """Losses and gradient norms of three steps: undisturbed, with the place lent after each of them, and between its
    gradients and its update."""
    config = tiny_model(family).config
    arch = arch_from_hf(config.to_dict() | {"architectures": [type(tiny_model(family)).__name__]})
    layout = resolve(
        LayoutConfig(**keys), arch, world_size=world_size, global_batch_size=8, tokens_per_pack=96
    )
    case = Case(world_size, keys, {}, Path(), SAMPLES, PLAN)
    objective, section = OBJECTIVES["sft"](), ModelConfig(hf=Path(), dtype=dtype)  # type: ignore[arg-type]
    told: list[list[float]] = []
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        ours, others = (
            random_weights(arch, seed=seed, dtype=DTYPES[dtype], device=mesh.device) for seed in (1, 2)
        )
        other = Model.open(arch, mesh, section, others)
        rewards = random_weights(arch.with_scalar_head(), seed=3, dtype=DTYPES[dtype], device=mesh.device)
        scorer = Model.open(arch.with_scalar_head(), mesh, section, rewards)
        for lends in ("never", "after", "between"):
            model = Model.open(arch, mesh, section, ours)
            model.prepare_to_train()
            optimizer = Optimizer(model.chunks, SETTINGS, layout, DTYPES[dtype])
            seen: list[float] = []
            for _ in range(3):
                optimizer.zero_grad()
                batch = step_batch(case, mesh)
                seen += run_step(model, batch, objective, train=True)[0].tolist()
                if lends == "between":
                    _lend(model, other, optimizer, others, batch)
                seen.append(optimizer.step(1e-2).grad_norm)
                if lends == "after":
                    _lend(model, other, optimizer, others, batch)
                    _lend_to_a_scorer(model, scorer, optimizer, rewards, batch)
            told.append(seen)
    return told


def _lend(model: Model, other: Model, optimizer: Optimizer, read: Any, batch: Any) -> None:
    model.synchronize()
    before = _bits(model, optimizer)
    packs = batch.micro_batches
    with model.lent(read):
        lent = model.read(packs, LOGPROBS, lambda out, pack: out[Quantity.LOGPROB].clone())
    expected = other.read(packs, LOGPROBS, lambda out, pack: out[Quantity.LOGPROB].clone())
    assert all(map(torch.equal, lent, expected))
    assert all(map(torch.equal, _bits(model, optimizer), before))

    def fail() -> None:
        assert not all(map(torch.equal, _bits(model, optimizer), before))
        raise RuntimeError("in the midst")

    with pytest.raises(RuntimeError, match="in the midst"), model.lent(read):
        fail()
    assert all(map(torch.equal, _bits(model, optimizer), before))


def _lend_to_a_scorer(model: Model, scorer: Model, optimizer: Optimizer, read: Any, batch: Any) -> None:
    """A reward model brings its head, and leaves no trace."""
    before = _bits(model, optimizer)

    def read_values(reader: Model) -> list[Tensor]:
        return reader.read(batch.micro_batches, VALUES, lambda out, pack: out[Quantity.VALUE].clone())

    with model.lent(read, scalar_head=True) as borrower:
        assert not any(name.startswith("output_layer") for name, _ in borrower.named_weights())
        lent = read_values(borrower)
    assert all(map(torch.equal, lent, read_values(scorer)))
    assert all(map(torch.equal, _bits(model, optimizer), before))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if CASES[name][0] == 8 else ()) for name in CASES]
)
def test_the_next_step_is_that_of_a_model_that_lent_nothing(name: str, ranks: RankPool) -> None:
    world_size, keys, dtype, family = CASES[name]
    for undisturbed, lent_after, lent_between in ranks.run(
        world_size, lend_between_steps, keys, dtype, family
    ):
        assert lent_after == undisturbed
        assert lent_between == undisturbed


def buckets_of(
    rank: int, world_size: int, keys: dict[str, Any], bucket_bytes: int
) -> list[dict[str, Tensor]]:
    arch = arch_from_hf(tiny_model("llama").config.to_dict())
    layout = resolve(
        LayoutConfig(**keys), arch, world_size=world_size, global_batch_size=8, tokens_per_pack=96
    )
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        read = random_weights(arch, seed=1, dtype=torch.float32, device=mesh.device)
        model = Model.open(arch, mesh, ModelConfig(hf=Path(), dtype="fp32"), read)
        buckets = [
            {name: tensor.clone() for name, tensor in bucket.items()}
            for bucket in model.tensors(bucket_bytes)
        ]
        dist.barrier()
    return buckets


def test_tensors_come_whole_once_and_in_bounded_buckets(ranks: RankPool) -> None:
    world_size, keys, _ = LAYOUTS["TP2×PP2×DP2+SP"]
    arch = arch_from_hf(tiny_model("llama").config.to_dict())
    largest = max(4 * sum(torch.Size(shape).numel() for shape in rule.hf_shapes) for rule in rules_for(arch))
    every = ranks.run(world_size, buckets_of, dict(keys), largest)
    named = [(name, tensor) for buckets in every for bucket in buckets for name, tensor in bucket.items()]
    read = random_weights(arch, seed=1, dtype=torch.float32, device=torch.device("cpu"))
    assert sorted(name for name, _ in named) == sorted(name for rule in rules_for(arch) for name in rule.hf)
    assert all(torch.equal(tensor, read(name)) for name, tensor in named)
    sizes = [sum(tensor.nbytes for tensor in bucket.values()) for buckets in every for bucket in buckets]
    assert max(sizes) <= largest
    assert sum(size > 0 for size in sizes) > 4


def norm_of_many(rank: int, world_size: int, fused: bool) -> tuple[float, float]:
    """The gradient norm of a large model whose gradient is one small number everywhere, and what it should be."""
    keys = {"vocab_size": 60_001, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    arch = arch_from_hf(tiny_model("llama").config.to_dict() | keys | {"head_dim": 16})
    layout = resolve(
        LayoutConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
        arch,
        world_size=world_size,
        global_batch_size=8,
        tokens_per_pack=96,
    )
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        read = random_weights(arch, seed=1, dtype=torch.float32, device=mesh.device)
        model = Model.open(arch, mesh, ModelConfig(hf=Path(), dtype="fp32"), read)
        model.prepare_to_train()
        optimizer = Optimizer(model.chunks, SETTINGS, layout, torch.float32, fused=fused)
        for _, weight in model.named_weights():
            weight.main_grad.fill_(1e-3)
        return optimizer.gradient_norm(), 1e-3 * math.sqrt(parameter_count(arch))


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_norm_keeps_its_digits_in_a_large_model(fused: bool, ranks: RankPool) -> None:
    """In fp32 the squares of eight million numbers add up to one that is wrong in its third digit."""
    ((norm, expected),) = ranks.run(1, norm_of_many, fused)
    assert norm == pytest.approx(expected, rel=1e-7)
