"""Runs an SFT and a DPO step in which the host may not wait for the device: forward, backward, reduction.

    python benchmarks/waits.py [--geometry 8b|tiny] [--output benchmarks/results/waits.json]

torch raises an error where an operation waits (`torch.cuda.set_sync_debug_mode("error")`); the traceback names it.
A first step of each warms up unwatched. The gradient norm and the metrics, after the schedule, wait by design, once
each a step. Without a GPU the same steps run and nothing is watched. Writes JSON; the exit code is 1 after a wait.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from one_rank import one_rank
from our_trainer import dpo_batch, dpo_objective, our_trainer, sft_batch
from preference import best_packs
from step_workload import GEOMETRIES, Geometry, forget, make_packs, make_pairs

from paralign.engine.batch import StepBatch
from paralign.engine.objectives import SFT, Objective
from paralign.engine.objectives.dpo import DPO
from paralign.engine.training.step import run_own


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """Where torch can tell, on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def watch(
    geometry: Geometry, batch: StepBatch, objective: Objective, dtype: str, device: torch.device
) -> str:
    """What waited, or nothing."""
    forget(device)
    with our_trainer(
        geometry, len(batch.micro_batches), dtype, reference=isinstance(objective, DPO)
    ) as trainer:
        if trainer.reference is not None:
            trainer.reference.fill(batch)
        trainer.step(batch, objective)
        trainer.optimizer.zero_grad()
        try:
            with nothing_waits(device):
                run_own(trainer.model, batch, objective, train=True)
        except RuntimeError:
            return traceback.format_exc()
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps in which the host may not wait for the device.")
    parser.add_argument("--geometry", choices=list(GEOMETRIES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/waits.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watched = device.type == "cuda"
    geometry = GEOMETRIES[arguments.geometry or ("8b" if watched else "tiny")]
    dtype = "bf16" if watched else "fp32"
    with one_rank():
        pack = partial(best_packs, device=device, tokens_per_pack=geometry.tokens_per_pack)
        steps: dict[str, tuple[StepBatch, Objective]] = {
            "SFT": (sft_batch(make_packs(geometry), geometry.tokens_per_pack, device), SFT()),
            "DPO": (dpo_batch(make_pairs(geometry), pack, share_prefix=True), dpo_objective()),
        }
        found = {name: watch(geometry, *step, dtype, device) for name, step in steps.items()}
    for name, waited in found.items():
        print(f"{name}: {waited or ('nothing waits' if watched else 'no GPU: it runs, nothing is watched')}")
    note = "" if watched else "no GPU at hand: nothing was watched; no figure here counts"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"note": note, "waits": found}, indent=1) + "\n")
    raise SystemExit(any(found.values()))


if __name__ == "__main__":
    main()
