"""What `check` finds out, and what it refuses before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paralign.engine.data.epochs import with_packing
from paralign.engine.data.packing import MIXED, PLAIN
from paralign.engine.run import check as module
from paralign.engine.run.check import CheckReport, check, packing_of_run
from paralign.engine.run.recipe import load
from paralign.models.errors import DataError, LayoutError, ParalignError, RecipeError, WeightsError


def checked(*overrides: str, gpus: int | None = None) -> CheckReport:
    return check(load(Path("recipe.yaml"), overrides), gpus)


def test_a_report_adds_up(project: Path) -> None:
    report = checked(gpus=4)
    assert (report.layout.dp, report.layout.micro_batches) == (2, 2)
    assert len(report.caches["train"]) == 40
    assert report.total_steps == 2 * report.steps.steps == 2 * -(-report.steps.packs // 4)
    assert checked("train.epochs=null", "train.max_steps=7").total_steps == 7


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        ("{tensor_model_parallel_size: 1, pipeline_model_parallel_size: 1}", False),
        ("{tensor_model_parallel_size: 1, pipeline_model_parallel_size: 1}", True),
        ("{tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}", False),
        ("{tensor_model_parallel_size: 1, pipeline_model_parallel_size: 2}", True),
    ],
)
def test_parameters_per_rank_are_counted(project: Path, layout: str, tied: bool) -> None:
    """By hand: 16 wide, 4 layers of 4 heads with 2 KV groups and an FFN of 32, vocabulary 9."""
    path = project / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": tied}))
    report = checked(f"layout={layout}")
    tp, pp = report.layout.tp, report.layout.pp
    layer = (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 32) // tp + 2 * 16
    table = -(-9 // tp) * 16
    last_stage = 4 // pp * layer + 16 + (table if pp > 1 or not tied else 0) + (table if pp == 1 else 0)
    assert report.parameters_per_rank == last_stage


def test_the_report_says_what_matters(project: Path) -> None:
    facts = checked(gpus=2).facts()
    assert facts["layout"].startswith("2 GPUs = tp 2 × pp 1 × dp 1")
    assert facts["train"].startswith("40 samples")
    assert "±" in facts["a step"]
    assert facts["steps"].startswith("2 epochs ×")


def test_too_little_time_to_save_has_a_remedy_that_fits(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_BYTES_PER_SECOND", 1.0)
    for name, remedy in (
        ("KillWait", "before scancel use `scancel --signal=USR1 JOB`"),
        ("GraceTime", "PreemptParameters=send_user_signal or a longer GraceTime"),
    ):
        monkeypatch.setattr(module, "waits_of_slurm", lambda name=name: {name: 30})
        assert f"SLURM's {name} is 30 s: " in (said := checked().facts()["to stop"])
        assert remedy in said
        assert ("scancel" in said) == (name == "KillWait")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["model.hf=nowhere"], WeightsError, "nowhere/config.json"),
        (["model.init=weights"], WeightsError, "no model.safetensors"),
        (["data.train=[train.jsonl, a.jsonl, b.jsonl]"], DataError, "data.train: a.jsonl: no such file"),
        (["data.validation.code=c.jsonl"], DataError, "data.validation.code: c.jsonl: no such file"),
        (["layout.tensor_model_parallel_size=8"], LayoutError, "tp 8 does not divide 4 attention heads"),
        (["layout.pipeline_model_parallel_size=3"], LayoutError, "4 layers do not divide into pp 3"),
        (
            [
                "model.recompute_granularity=full",
                "model.recompute_method=uniform",
                "model.recompute_num_layers=3",
            ],
            RecipeError,
            "model.recompute_num_layers: 3 does not divide the 4 layers of a chunk",
        ),
        (
            ["optimizer.lr_warmup_steps=500"],
            RecipeError,
            "optimizer: a warm-up of 500 steps leaves none of the",
        ),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(
    project: Path, overrides: list[str], error: type[ParalignError], message: str
) -> None:
    with pytest.raises(error) as raised:
        checked(*overrides)
    assert message in str(raised.value)


def test_all_missing_files_are_told(project: Path) -> None:
    with pytest.raises(DataError) as raised:
        checked("data.train=[a, b]", "data.validation.chat=c")
    assert len(str(raised.value).split("\n")) == 3


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(project: Path) -> None:
    path = project / "model/config.json"
    path.write_text(path.read_text().replace('"vocab_size": 9', '"vocab_size": 6'))
    with pytest.raises(WeightsError, match="has token 6, but vocab_size is 6"):
        checked()


def test_samples_longer_than_the_models_context_are_refused(project: Path) -> None:
    path = project / "model/config.json"
    path.write_text(path.read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": 8'))
    with pytest.raises(RecipeError, match=r"data\.train: a sample of \d+ tokens is longer than"):
        checked()


def test_the_command_line_starts_without_megatron(project: Path) -> None:
    """`paralign check` answers at once: megatron-core, which costs seconds, is never loaded."""
    code = (
        "import sys; import paralign.engine.cli; assert 'megatron' not in sys.modules\n"
        "from paralign.engine.run.check import check; from paralign.engine.run.recipe import load; import pathlib\n"
        "check(load(pathlib.Path('recipe.yaml')))\n"
        "assert 'megatron' not in sys.modules; assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("overrides", "bytes_per_parameter"),
    [
        ((), 8 + 8 / 2),
        (("model.dtype=bf16",), 6 + 12 / 2),
        (("model.dtype=bf16", "optimizer.optimizer_cpu_offload=true"), 6 + 4 / 2),
    ],
)
def test_state_is_weights_gradients_and_a_share_of_the_optimizer(
    project: Path, overrides: tuple[str, ...], bytes_per_parameter: float
) -> None:
    report = check(load(project / "recipe.yaml", overrides), 4)  # tp 2 × dp 2
    assert report.state_bytes_per_rank == report.parameters_per_rank * bytes_per_parameter


def test_a_run_is_packed_as_its_newest_readable_checkpoint_says(tmp_path: Path) -> None:
    def saved(step: int, progress: str) -> None:
        directory = tmp_path / "checkpoints" / f"iter_{step:07d}"
        directory.mkdir(parents=True)
        (directory / "progress.json").write_text(progress)

    assert packing_of_run(tmp_path) == MIXED
    saved(5, '{"step": 5, "data": "0123/4/1"}')
    assert packing_of_run(tmp_path) == PLAIN
    saved(10, "broken")
    assert packing_of_run(tmp_path) == PLAIN
    saved(15, json.dumps({"step": 15, "data": with_packing("0123/4/1", MIXED)}))
    assert packing_of_run(tmp_path) == MIXED
