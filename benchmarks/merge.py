"""Times merging beside MergeKit's on the same three directories, watches memory, compares results.

    python benchmarks/merge.py --mergekit /path/to/bin/mergekit-yaml [--layers 1] [--vocabulary 32000]
    python benchmarks/merge.py --mergekit … --layers 2 --vocabulary 1000 --hidden 256 --dtype float32

MergeKit lives in an environment of its own. A base and two models of Llama-3-8B layer shapes, random bf16,
merged in fp32 and written as float32 by both; each in a process of its own, results compared tensor by tensor.
The second line compares values more than speed: on large tensors MergeKit's fp32 norms (model_stock) are off by
about a hundredth, and of bf16 deltas many are equal, among which ties has to choose.
dare_ties keeps everything here (density 1): what it drops is random, and each has its own numbers. Without
--mergekit only our side runs. Prints a table, then one line of JSON; removes what it made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from llama_directory import make_directory, watch

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"weight": 0.6, "lambda": 0.7},
    "model_stock": {},
    "slerp": {"t": 0.3},
    "ties": {"weight": 0.5, "density": 0.4},
    "dare_ties": {"weight": 0.5, "density": 1.0},
}
DIFFERENCE = """
import sys
from pathlib import Path
from paralign.engine.checkpoint.hf import HFReader
ours, theirs = (HFReader(Path(folder)) for folder in sys.argv[1:])
names = [name for rule in ours.rules for name in rule.hf]
print(max((ours.read(name) - theirs.read(name)).abs().max().item() for name in names))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Merging beside MergeKit's.")
    parser.add_argument("--mergekit", type=Path, help="The mergekit-yaml command of another environment.")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/merge_benchmark"))
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True)
    rows = []
    try:
        for seed, name in enumerate(("base", "one", "two")):
            size = make_directory(
                folder / name,
                layers=arguments.layers,
                vocabulary=arguments.vocabulary,
                seed=seed,
                hidden=arguments.hidden,
                dtype=arguments.dtype,
            )
        print(
            f"{size / 1e9:.2f} GB each\n{'method':<17}{'':<10}{'seconds':>9}{'peak GB':>9}{'differs by':>12}"
        )
        for method in arguments.methods:
            rows += compare(folder, method, arguments.mergekit)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"bytes": size, "rows": rows}))


def compare(folder: Path, method: str, mergekit: Path | None) -> list[dict[str, Any]]:
    """A row for each side; the largest difference over all tensors in the second."""
    config = folder / "merge.yaml"
    config.write_text(yaml.safe_dump(configuration(folder, method)))
    ours = [sys.executable, "-m", "paralign.engine.cli", "merge", str(config), str(folder / "ours")]
    sides = {"ours": ours}
    if mergekit is not None:
        sides["MergeKit"] = [str(mergekit), str(config), str(folder / "theirs"), "--lazy-unpickle"]
    rows = []
    for side, command in sides.items():
        run = watch(command)
        row = {"method": method, "side": side, "seconds": run.seconds, "peak": run.peak}
        words = ""
        if side == "MergeKit":
            row["difference"] = largest_difference(folder / "ours", folder / "theirs")
            words = f"{row['difference']:12.1e}"
        rows.append(row)
        print(f"{method:<17}{side:<10}{run.seconds:9.1f}{run.peak / 1e9:9.2f}{words}", flush=True)
    for name in ("ours", "theirs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return rows


def configuration(folder: Path, method: str) -> dict[str, Any]:
    models = [{"model": str(folder / name)} for name in ("one", "two")]
    content: dict[str, Any] = {"merge_method": method, "dtype": "float32", "models": models}
    if method == "linear":
        models.append({"model": str(folder / "base")})
        for entry, weight in zip(models, (0.5, 0.3, 0.4)):
            entry["parameters"] = {"weight": weight}  # type: ignore[assignment]
        return content
    if method == "slerp":
        content["models"] = [{"model": str(folder / "base")}, models[0]]
    content["base_model"] = str(folder / "base")
    if METHODS[method]:
        content["parameters"] = METHODS[method]
    return content


def largest_difference(left: Path, right: Path) -> float:
    """In a process of its own: what this one holds would count as its children's peak."""
    return float(watch([sys.executable, "-c", DIFFERENCE, str(left), str(right)]).output)


if __name__ == "__main__":
    main()
