"""Training with every fused operation on (on the CPU their references) equals transformers, and resumes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from paralign.engine.backends import ours
from paralign.engine.config.model import ModelConfig
from paralign.engine.config.optimizer import OptimizerConfig
from paralign.engine.kernels.library import Found
from paralign.engine.objectives import OBJECTIVES
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.training.build import DTYPES, random_weights
from paralign.engine.training.model import Model
from paralign.engine.training.optim import FusedAdamW, Optimizer
from paralign.engine.training.step import run_step
from paralign.models import arch_from_hf

from .certificate import Case, step_batch
from .comparing import assert_weights_equal, metrics_of
from .fused import certify_fused
from .pool import RankFailure, RankPool
from .reference import SAMPLES
from .test_certificate import BOUNDS, LAYOUTS, PLANS
from .toy import make_toy, train_recipe, write_recipe

PLAN = PLANS["8 packs of 96, in order"]
CLIP = 0.1


@pytest.mark.parametrize(
    ("layout", "family", "model"),
    [
        ("1", "llama", {"kernels": "reference"}),  # Megatron's own accumulation of weight gradients
        pytest.param("TP2", "qwen2", {}, marks=pytest.mark.certificate),  # tied embeddings
        pytest.param(
            *("TP2×PP2×DP2+SP, VPP2, overlap, recompute 2", "llama", {}), marks=pytest.mark.certificate
        ),
    ],
)
def test_fused_operations_equal_transformers(
    layout: str,
    family: str,
    model: dict,
    ranks: RankPool,
    references: Callable[[str], Path],
    certificate_table: list,
) -> None:
    world_size, keys, more = LAYOUTS[layout]
    case = Case(world_size, keys, {**more, **model}, references(family), SAMPLES, PLAN)
    row = ranks.run(world_size, certify_fused, case)[0]
    certificate_table.append((f"{layout} | {family} | fused operations {model or ''}", row))
    for figure in ("loss", "gradient", "grad_norm", "loss_after"):
        assert getattr(row, figure) <= getattr(BOUNDS, figure), f"{figure}: {row}"


def train_in_bf16(
    rank: int, world_size: int, case: Case, fused: bool
) -> tuple[list[float], list[torch.Tensor]]:
    """Three clipped steps: their gradient norms, and this rank's main parameters after the first.

    After each the model's weights must be the main parameters, rounded.
    """
    reference = torch.load(case.reference, weights_only=False)
    arch = arch_from_hf(reference.config)
    layout = resolve(
        LayoutConfig(**case.layout),
        arch,
        world_size=world_size,
        global_batch_size=len(case.plan.packs),
        tokens_per_pack=case.plan.tokens_per_pack,
    )
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        read = random_weights(arch, seed=0, dtype=DTYPES["bf16"], device=mesh.device)
        model = Model.open(arch, mesh, ModelConfig(hf=Path(), dtype="bf16"), read)
        model.prepare_to_train()
        settings = OptimizerConfig(lr=1e-3, lr_decay_style="constant", weight_decay=0.1, clip_grad=CLIP)
        optimizer = Optimizer(model.chunks, settings, layout, DTYPES["bf16"], fused=fused)
        part = optimizer.megatron.chained_optimizers[0]
        assert isinstance(part.optimizer, FusedAdamW) == fused
        norms, after_one_step = [], []
        for _ in range(3):
            optimizer.zero_grad()
            run_step(model, step_batch(case, mesh), OBJECTIVES["sft"](), train=True)
            norms.append(optimizer.step(1e-3).grad_norm)
            model.synchronize()
            for mains, weights in zip(part.shard_fp32_from_float16_groups, part.model_float16_groups):
                for main, weight in zip(mains, weights):
                    place = part._get_model_param_range_map(weight)["param"]
                    assert torch.equal(weight.view(-1)[place.start : place.end], main.bfloat16())
                    if len(norms) == 1:
                        after_one_step.append(main.detach().clone())
        return norms, after_one_step


@pytest.mark.parametrize(
    "layout",
    ["DP2", pytest.param("TP2×PP2×DP2+SP, VPP2, overlap, recompute 2", marks=pytest.mark.slow)],
)
def test_the_fused_update_is_torchs_and_writes_the_models_weights(
    layout: str, ranks: RankPool, references: Callable[[str], Path]
) -> None:
    """In bf16, divided over ranks; the gradient's norm is above the limit, so that the factor counts."""
    world_size, keys, _ = LAYOUTS[layout]
    case = Case(world_size, keys, {}, references("llama"), SAMPLES, PLAN)
    ours, theirs = (ranks.run(world_size, train_in_bf16, case, fused) for fused in (True, False))
    for (norms, mains), (their_norms, their_mains) in zip(ours, theirs, strict=True):
        assert min(norms) > 2 * CLIP
        assert norms[0] == pytest.approx(their_norms[0], rel=1e-6)
        # Afterwards a main weight that differs in its last bit may round to another bf16.
        assert norms == pytest.approx(their_norms, rel=1e-2)
        assert mains
        for main, their_main in zip(mains, their_mains, strict=True):
            torch.testing.assert_close(main, their_main, rtol=1e-6, atol=1e-8)


def _losses(run_dir: Path) -> dict[tuple[int, str], float]:
    return {
        key: value for key, value in metrics_of(run_dir).items() if "loss" in key[1] or key[1] == "grad_norm"
    }


def train_recipe_fused(rank: int, world_size: int, recipe: Path, stop_before: int | None = None) -> None:
    """As if the kernels were built: the references of our operations run."""
    found = Found(object(), ())  # type: ignore[arg-type]
    with mock.patch.object(ours, "find_library", return_value=found):
        train_recipe(rank, world_size, recipe, stop_before)


@pytest.mark.parametrize(("tp", "n"), [(1, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_fused_training_resumes_equal_to_the_bit_and_from_torchs_state(
    tp: int, n: int, ranks: RankPool, tmp_path: Path
) -> None:
    make_toy(tmp_path)
    layout = {"tensor_model_parallel_size": tp, "overlap_grad_reduce": True, "overlap_param_gather": True}
    unsaved = {"checkpoint__save_every_steps": None}
    ranks.run(n, train_recipe_fused, write_recipe(tmp_path, "straight", layout))
    half = "checkpoints/iter_0000005"
    shutil.copytree(tmp_path / "straight" / half, tmp_path / "resumed" / half)
    ranks.run(n, train_recipe_fused, write_recipe(tmp_path, "resumed", layout, **unsaved))
    losses = _losses(tmp_path / "straight")
    assert _losses(tmp_path / "resumed") == {key: value for key, value in losses.items() if key[0] >= 5}
    assert_weights_equal(tmp_path / "resumed/hf/final", tmp_path / "straight/hf/final")

    with pytest.raises(RankFailure):
        ranks.run(n, train_recipe, write_recipe(tmp_path, "mixed", layout), 5)  # killed behind its save
    ranks.run(n, train_recipe_fused, write_recipe(tmp_path, "mixed", layout, **unsaved))
    assert _losses(tmp_path / "mixed") == pytest.approx(losses, rel=1e-5)
