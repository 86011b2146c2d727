"""What checksums cost a run: its saves and loads with them and without, in one process.

    OMP_NUM_THREADS=1 python benchmarks/checksums.py [--hidden 512] [--layers 10] [--repeats 5]

A random Llama in fp32 on one rank; its training state lies in the page cache. Each round saves twice, without digests
and with them. Then it reads the state through, as a start does, and loads it. Prints medians of the wall clock, then
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import yaml
from one_rank import one_rank
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from paralign.engine.checkpoint import store
from paralign.engine.checkpoint.manifest import FileDigest
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.processes.stop import Stop
from paralign.engine.run.assemble import build_trainer
from paralign.engine.run.check import check
from paralign.engine.run.recipe import load
from paralign.engine.training.resuming import broken
from paralign.tools.demo import make_data, make_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Saves and loads with checksums and without.")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, one_rank():
        found, n_bytes = _measure(Path(folder), arguments.hidden, arguments.layers, arguments.repeats)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    saving = medians["save"] / medians["save, no digests"] - 1
    loading = medians["read through"] / medians["load"]
    for name, seconds in medians.items():
        print(f"{name:<20}{seconds:>8.2f} s{n_bytes / seconds / 1e9:>8.2f} GB/s")
    print(f"digests: {saving:+.0%} of a save; reading through: {loading:+.0%} of a load")
    print(json.dumps({"bytes": n_bytes, "repeats": arguments.repeats, **medians}))


def _measure(folder: Path, hidden: int, layers: int, repeats: int) -> tuple[dict[str, list[float]], int]:
    recipe = load(_recipe(folder, hidden, layers), ())
    report = check(recipe, 1)
    found: dict[str, list[float]] = {
        name: [] for name in ("save", "save, no digests", "read through", "load")
    }
    with open_mesh(report.layout, local_rank=0, seed=0) as mesh:
        checkpoints = build_trainer(report, mesh, Stop()).checkpoints
        directory = store.directory_of(checkpoints.root, 1)

        def save() -> None:
            checkpoints.save(store.Progress(1, ""), lambda: None)

        nothing = FileDigest(0, "")
        for _ in range(repeats):
            with patch("paralign.engine.training.saving.digest_file", return_value=nothing):
                found["save, no digests"].append(_seconds(save))
            found["save"].append(_seconds(save))
            found["read through"].append(_seconds(lambda: broken(directory, mesh)))
            found["load"].append(_seconds(lambda: checkpoints.load(directory)))
        return found, sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _recipe(folder: Path, hidden: int, layers: int) -> Path:
    make_data(folder / "data")
    model = folder / "model"
    make_model(model, folder / "data/train.jsonl")
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            vocab_size=len(AutoTokenizer.from_pretrained(model)),
        )
    ).save_pretrained(model)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "objective": "sft",
                "run_dir": str(folder / "run"),
                "model": {"hf": str(model), "dtype": "fp32"},
                "layout": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
                "data": {
                    "train": str(folder / "data/train.jsonl"),
                    "chat_template": "chatml",
                    "tokens_per_pack": 512,
                    "too_long": "error",
                    "cache_dir": str(folder / "cache"),
                },
                "optimizer": {
                    "lr": 1e-3,
                    "weight_decay": 0.1,
                    "lr_decay_style": "constant",
                    "lr_warmup_steps": 0,
                },
                "train": {"global_batch_size": 1, "max_steps": 2, "seed": 0, "eval_every_steps": None},
                "checkpoint": {"save_every_steps": 1},
            }
        )
    )
    return recipe


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
