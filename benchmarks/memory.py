"""What an SFT step takes on one device, beside what the dry run says of it (tools/dryrun.py).

    python benchmarks/memory.py [--geometry 8b|70b|tiny] [--output benchmarks/results/memory.json]

Full packs whose every token is learned, as in the dry run. Allocated is what torch's tensors held at once, reserved
what its allocator took for them. Without a GPU the step runs, nothing is measured, and the prediction stands alone.
Writes JSON; the exit code is 1 where more than 1.1 times the prediction was allocated.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in a run, before torch reads it

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from one_rank import one_rank
from our_trainer import one_rank_layout, our_trainer, sft_batch
from step_workload import GEOMETRIES, Geometry, Pack

from paralign.engine.config.model import ModelConfig
from paralign.engine.objectives import SFT
from paralign.models import arch_from_hf
from paralign.tools.dryrun import dry_run

ALLOWED = 1.1


def full_packs(geometry: Geometry) -> list[Pack]:
    """Four conversations to a pack, every token learned."""
    draw, rows = torch.Generator().manual_seed(0), geometry.tokens_per_pack // 4
    tokens = torch.randint(geometry.vocabulary, (geometry.packs, 4, rows), generator=draw)
    return [[(row, [True] * rows) for row in pack] for pack in tokens.tolist()]


def predict(geometry: Geometry, dtype: str) -> dict[str, Any]:
    """What the dry run says, in a process that sees no GPU."""
    command = [sys.executable, __file__, "--predict", json.dumps([asdict(geometry), dtype])]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return dict(json.loads(said.splitlines()[-1]))


def _predict(geometry: Geometry, dtype: str) -> None:
    layout = one_rank_layout(geometry, geometry.packs)
    model = ModelConfig(hf=Path(), dtype=dtype)  # type: ignore[arg-type]
    arch, n_tokens = arch_from_hf(geometry.config()), geometry.tokens_per_pack
    print(json.dumps(asdict(dry_run(arch, layout, model, SFT(), rank=0, tokens_per_pack=n_tokens))))


def measured(geometry: Geometry, dtype: str, device: torch.device) -> dict[str, int]:
    """Peaks over three steps, bytes; nothing without a GPU."""
    batch = sft_batch(full_packs(geometry), geometry.tokens_per_pack, device)
    with one_rank(), our_trainer(geometry, geometry.packs, dtype) as trainer:
        for _ in range(3):
            trainer.step(batch, SFT())
    if device.type == "cpu":
        return {}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def main() -> None:
    parser = argparse.ArgumentParser(description="A step's memory beside what the dry run says.")
    parser.add_argument("--geometry", choices=list(GEOMETRIES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--predict", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.predict:
        geometry, dtype = json.loads(arguments.predict)
        return _predict(Geometry(**geometry), dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    name = arguments.geometry or ("8b" if on_gpu else "tiny")
    geometry, dtype = GEOMETRIES[name], "bf16"
    predicted, found = predict(geometry, dtype), measured(geometry, dtype, device)
    for what, n_bytes in predicted.items():
        print(f"dry run   {what:12}{n_bytes / 1e9:9.3f} GB")
    for what, n_bytes in found.items():
        print(
            f"measured  {what:12}{n_bytes / 1e9:9.3f} GB{n_bytes / predicted['peak']:9.3f} of the dry run's peak"
        )
    note = "" if on_gpu else "no GPU at hand: nothing was measured; no figure here counts"
    facts = {"note": note, "geometry": name, "predicted_bytes": predicted, "measured_bytes": found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n")
    raise SystemExit(found.get("allocated", 0) > ALLOWED * predicted["peak"])


if __name__ == "__main__":
    main()
