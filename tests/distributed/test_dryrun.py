"""Recipes hold what their comments say, computed by a step on fake tensors, without the GPUs that they are for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paralign.engine.config.model import ModelConfig
from paralign.engine.objectives import build_objective
from paralign.engine.run.recipe import load
from paralign.models import arch_from_hf
from paralign.tools.dryrun import Held, dry_run

from ..tiny import config_keys

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for the CPU")

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"architecture": "LlamaForCausalLM", "num_key_value_heads": 8, "vocab_size": 128256}
QWEN = {"architecture": "Qwen2ForCausalLM", "num_key_value_heads": 8, "vocab_size": 152064}
LARGE = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
SMALL = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
MODELS = {  # with the GPUs that the recipes are for
    "llama3_70b": (32, {**LLAMA, **LARGE, "intermediate_size": 28672, "max_position_embeddings": 8192}),
    "qwen2_72b": (32, {**QWEN, **LARGE, "intermediate_size": 29568, "max_position_embeddings": 32768}),
    "llama3_8b": (8, {**LLAMA, **SMALL, "intermediate_size": 14336, "max_position_embeddings": 8192}),
}
STATED = re.compile(r"at most ([\d.]+) GB(?: on the first stage, ([\d.]+) on the last)?")


def held(recipe_file: Path, *, last: bool = False, **model: object) -> Held:
    recipe = load(recipe_file)
    gpus, keys = MODELS[recipe_file.stem]
    arch = arch_from_hf(config_keys(**keys))
    layout = recipe.resolve_layout(arch, gpus)
    return dry_run(
        arch,
        layout,
        ModelConfig.model_validate({**recipe.model.model_dump(), **model}),
        build_objective(recipe.objective),
        rank=gpus - gpus // layout.pp if last else 0,
        tokens_per_pack=recipe.data.tokens_per_pack,
    )


@pytest.mark.parametrize(
    "name",
    [
        "sft/llama3_70b",
        *(
            pytest.param(str(path.relative_to(ROOT / "recipes").with_suffix("")), marks=pytest.mark.slow)
            for path in sorted((ROOT / "recipes").glob("*/*.yaml"))
            if path.stem in MODELS and path != ROOT / "recipes/sft/llama3_70b.yaml"
        ),
    ],
)
def test_a_recipe_holds_what_its_comments_say(name: str) -> None:
    path = ROOT / f"recipes/{name}.yaml"
    comments = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    stated = STATED.search(comments)
    assert stated, "the comments state no peak"
    for last, gigabytes in enumerate(filter(None, stated.groups())):
        assert held(path, last=bool(last)).peak / 1e9 == pytest.approx(float(gigabytes), rel=0.01)
    assert not dist.is_initialized()


@pytest.mark.slow
def test_recomputed_parts_are_missing_from_the_peak() -> None:
    """As docs/layouts.md says: 4 · hidden size and 6 · FFN for each row and layer, over tp 2."""
    recipe = ROOT / "recipes/sft/llama3_8b.yaml"
    whole = held(recipe)
    less = held(recipe, recompute_granularity="selective", recompute_modules=("layernorm", "mlp"))
    saved = 32 * 8192 * (4 * 4096 + 6 * 14336) / 2
    assert whole.peak - less.peak == pytest.approx(saved, rel=0.01)
    assert whole.optimizer == less.optimizer


def test_a_dry_run_needs_a_process_of_its_own(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        with pytest.raises(ValueError, match="start one of its own"):
            held(ROOT / "recipes/sft/llama3_8b.yaml")
    finally:
        dist.destroy_process_group()
