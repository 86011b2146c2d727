"""Recipes: the shipped ones against their golden files, and agreement between sections."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paralign.engine.run.recipe import Recipe, dump, load
from paralign.models import arch_from_hf
from paralign.models.errors import RecipeError

from ...tiny import config_keys

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "recipes").glob("**/*.yaml"))


def golden(recipe: Path) -> Path:
    return (
        ROOT / "tests/golden" / f"{'_'.join(recipe.relative_to(ROOT / 'recipes').with_suffix('').parts)}.yaml"
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_resolves_to_its_golden_file(path: Path) -> None:
    """To renew them: RENEW_GOLDEN=1 pytest tests/engine/run/test_recipe.py, then read the difference."""
    resolved = dump(load(path))
    if os.environ.get("RENEW_GOLDEN"):
        golden(path).write_text(resolved)
    assert resolved == golden(path).read_text()


def test_no_golden_file_outlives_its_recipe() -> None:
    assert {golden(path) for path in SHIPPED} == set((ROOT / "tests/golden").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_of_readable_length(path: Path) -> None:
    assert 40 <= len(path.read_text().splitlines()) <= 70


@pytest.mark.parametrize(
    ("name", "gpus", "architecture", "hidden", "layers", "heads", "ffn"),
    [
        ("llama3_70b", 32, "LlamaForCausalLM", 8192, 80, 64, 28672),
        ("qwen2_72b", 32, "Qwen2ForCausalLM", 8192, 80, 64, 29568),
        ("llama3_8b", 8, "LlamaForCausalLM", 4096, 32, 32, 14336),
    ],
)
def test_a_shipped_layout_fits_its_model(
    name: str, gpus: int, architecture: str, hidden: int, layers: int, heads: int, ffn: int
) -> None:
    recipe = load(ROOT / f"recipes/sft/{name}.yaml")
    arch = arch_from_hf(
        config_keys(
            architecture,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=8192,
        )
    )
    layout = recipe.resolve_layout(arch, gpus)
    assert layout.world_size == gpus


def test_a_dump_loads_back_equal(project: Path) -> None:
    recipe = load(Path("recipe.yaml"), ["optimizer.lr=3e-5", "tokenizer=model", "data.train=[a, b]"])
    (project / "resolved.yaml").write_text(dump(recipe))
    assert load(Path("resolved.yaml")) == recipe
    assert recipe.optimizer.lr == 3e-5


def test_the_tokenizer_is_the_models_unless_given(project: Path) -> None:
    assert load(Path("recipe.yaml")).tokenizer_dir == Path("model")
    assert load(Path("recipe.yaml"), ["tokenizer=other"]).tokenizer_dir == Path("other")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_steps=3"], "recipe.yaml:22 train: give epochs or max_steps; both are given"),
        (["train.epochs=null"], "give epochs or max_steps; neither is given"),
        (["data.validation={}"], "train.eval_every_steps needs a set in data.validation"),
        (["checkpoint.keep_best=validation/caht/loss"], "this recipe has validation/chat/loss"),
        (
            ["checkpoint.keep_best=validation/chat/loss", "checkpoint.save_every_steps=null"],
            "keep_best needs train.eval_every_steps and checkpoint.save_every_steps",
        ),
        (["model.recompute_granularity=full"], "needs recompute_method and recompute_num_layers"),
        (["model.recompute_num_layers=1"], "need recompute_granularity"),
        (["model.recompute_granularity=selective"], "needs recompute_modules; name some, such as"),
        (["model.recompute_modules=[mlp]"], "need recompute_granularity: selective"),
        (
            [
                "model.recompute_granularity=selective",
                "model.recompute_modules=[mlp]",
                "model.recompute_num_layers=1",
            ],
            "need recompute_granularity: full; set it, or delete them",
        ),
        (
            ["model.recompute_granularity=selective", "model.recompute_modules=[mlp, mlp_act]"],
            "mlp computes the activation again too; delete mlp_act",
        ),
        (
            ["model.recompute_granularity=selective", "model.recompute_modules=[layernrom]"],
            "expected core_attn, layernorm, mlp or mlp_act; did you mean layernorm?",
        ),
        (["checkpoint.max_shard_size=5"], "max_shard_size=5: read 5; expected text"),
        (["checkpoint.max_shard_size=5 GB"], "expected text that matches"),
        (
            ["objective=dop"],
            'objective.name: read "dop"; expected sft, reward, dpo, kto, simpo, orpo or cpo; did you',
        ),
        (["objective=dpo"], "objective=dpo objective.beta: missing: how strongly the policy is held"),
        (["objective={name: dpo, bta: 1}"], "objective.bta: unknown key; did you mean beta?"),
        (["objective={name: dpo, beta: 1, loss_type: hing}"], "objective.loss_type: read"),
        (
            ["objective={name: simpo, beta: 1, gamma: 1}", "data.too_long=truncate"],
            "data.too_long: truncate is not for answers",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(
    project: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        load(Path("recipe.yaml"), overrides)
    assert message in str(raised.value)


def test_more_epochs_than_can_be_planned_are_refused(project: Path) -> None:
    """`check` plans them one by one: a number with a digit too many would keep it for hours."""
    with pytest.raises(RecipeError, match="read 1001; expected at most 1000"):
        load(Path("recipe.yaml"), ["train.epochs=1001", "train.max_steps=null"])


def test_every_key_has_a_meaning() -> None:
    """What a missing key means is quoted from its section's docstring."""
    from paralign.engine.config.decoding import meaning

    def silent(section: type, prefix: str = "") -> list[str]:
        found = []
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            found += [] if meaning(section, name) else [prefix + name]
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                found += silent(field.annotation, f"{prefix}{name}.")
        return found

    assert silent(Recipe) == []
