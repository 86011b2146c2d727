"""Selective recompute: the same numbers to the bit, and as many bytes less as the documentation says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest
import torch

from paralign.engine.backends import ours
from paralign.engine.config.model import ModelConfig
from paralign.engine.kernels.library import Found
from paralign.engine.objectives import OBJECTIVES
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import Mesh, open_mesh
from paralign.engine.training.build import DTYPES, random_weights
from paralign.engine.training.model import Model
from paralign.engine.training.step import run_step
from paralign.models import arch_from_hf

from .certificate import Case, step_batch
from .pool import RankPool
from .reference import SAMPLES
from .test_certificate import LAYOUTS, PLANS

PLAN = PLANS["8 packs of 96, in order"]
EVERYTHING = ("core_attn", "layernorm", "mlp")
FUSED = Found(object(), ())  # type: ignore[arg-type]  # as if the kernels were built: their references run


def opened(case: Case, mesh: Mesh, dtype: str, modules: Sequence[str]) -> Model:
    arch = arch_from_hf(torch.load(case.reference, weights_only=False).config)
    keys = {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
    section = ModelConfig(hf=Path(), dtype=dtype, **keys)  # type: ignore[arg-type]
    read = random_weights(arch, seed=0, dtype=DTYPES[dtype], device=torch.device("cpu"))
    return Model.open(arch, mesh, section, read)


def mesh_of(rank: int, world_size: int, case: Case) -> AbstractContextManager[Mesh]:
    layout = resolve(
        LayoutConfig(**case.layout),
        arch_from_hf(torch.load(case.reference, weights_only=False).config),
        world_size=world_size,
        global_batch_size=len(case.plan.packs),
        tokens_per_pack=case.plan.tokens_per_pack,
    )
    return open_mesh(layout, local_rank=rank, seed=1)


def numbers(
    rank: int, world_size: int, case: Case, dtype: str, modules: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums of a step, and gradients by parameter."""
    with mesh_of(rank, world_size, case) as mesh, mock.patch.object(ours, "find_library", return_value=FUSED):
        model = opened(case, mesh, dtype, modules)
        model.prepare_to_train()
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        sums = run_step(model, step_batch(case, mesh), OBJECTIVES["sft"](), train=True)
        return sums, {name: weight.main_grad.clone() for name, weight in model.named_weights()}


@pytest.mark.parametrize(
    ("layout", "family", "dtype", "modules"),
    [
        ("1", "llama", "bf16", ("layernorm",)),
        ("1", "llama", "bf16", ("mlp_act",)),
        ("1", "qwen3", "bf16", EVERYTHING),
        ("TP2+SP", "llama", "fp32", EVERYTHING),
        ("PP2×VPP2", "llama", "fp32", EVERYTHING),
        ("TP2", "baichuan2-13b", "fp32", EVERYTHING),
        pytest.param(
            "TP2×PP2×DP2+SP, VPP2, overlap, recompute 2", "llama", "fp32", EVERYTHING, marks=pytest.mark.slow
        ),
    ],
)
def test_recomputing_changes_no_bit(
    layout: str,
    family: str,
    dtype: str,
    modules: Sequence[str],
    ranks: RankPool,
    references: Callable[[str], Path],
) -> None:
    world_size, keys, _ = LAYOUTS[layout]
    case = Case(world_size, keys, {}, references(family), SAMPLES, PLAN)
    plain, again = (ranks.run(world_size, numbers, case, dtype, which) for which in ((), modules))
    for (sums, gradients), (expected, theirs) in zip(again, plain, strict=True):
        assert torch.equal(sums, expected)
        assert any(gradient.any() for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert torch.equal(gradient, theirs[name]), name


def bytes_kept(rank: int, world_size: int, case: Case, modules: Sequence[str]) -> int:
    """By the graph of one layer, its weights aside."""
    with mesh_of(rank, world_size, case) as mesh, mock.patch.object(ours, "find_library", return_value=FUSED):
        model = opened(case, mesh, "bf16", modules)
        decoder, segments = model.modules[0], step_batch(case, mesh).micro_batches[0].segments
        segments.rope = decoder.rope_frequencies
        kept: dict[int, torch.UntypedStorage] = {}

        def look(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
            return tensor

        rows = case.plan.tokens_per_pack // mesh.tp.size
        hidden = torch.randn(rows, 1, model.arch.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
            output, _ = decoder.decoder.layers[0](hidden, packed_seq_params=segments)
        assert output.requires_grad
        for parameter in decoder.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("layout", ["1", "TP2+SP"])
def test_as_many_bytes_are_kept_as_the_documentation_says(
    layout: str, ranks: RankPool, references: Callable[[str], Path]
) -> None:
    """docs/layouts.md: for each row of a pack, bf16, divided by the tensor-parallel ranks."""
    world_size, keys, _ = LAYOUTS[layout]
    case = Case(world_size, keys, {}, references("llama"), SAMPLES, PLAN)
    hidden, ffn, rows = 64, 96, PLAN.tokens_per_pack // world_size

    def kept(*modules: str) -> int:
        return ranks.run(world_size, bytes_kept, case, modules)[0]

    everything = kept()
    assert everything - kept("layernorm") == 4 * hidden * rows
    assert everything - kept("mlp_act") == 2 * ffn * rows
    assert everything - kept("mlp") == 6 * ffn * rows
    assert everything - kept("layernorm", "mlp") == (4 * hidden + 6 * ffn) * rows
    # The CPU's kernel keeps more besides its input than that of a GPU.
    assert kept("core_attn") < everything
