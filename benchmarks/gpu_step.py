"""Times packed SFT and DPO training steps on one device, ours beside other people's trainers.

    python benchmarks/gpu_step.py [--geometry 8b|70b|tiny] [--steps 8] [--output benchmarks/results/gpu_step.json]

`8b` is Llama-3-8B with 8 layers, 61 GB in an SFT step by the dry run, for a device of 80 GB; `70b` is Llama-3-70B
with 4, 111 GB, for one of 141 GB. All trainers start from the same weights; timed are forward, backward, clipping and
AdamW of whole steps.

SFT. Lengths follow a mix: log-normal, median 350, σ 1.1, clipped to 16 … the pack's length. On the same packs: ours
as recipes run it, ours with `kernels: reference`, megatron-core's own local layers, transformers' model under torch's
fused AdamW, TRL's SFTTrainer, and TRL's with Liger; in bf16 those of transformers and TRL keep no fp32 weights, and
update less. The floor counts products only, forward and twice that backward, at the rate of a large product of the
run's precision measured in the same run.

DPO. The mix of preference.py. Ours padded, packed, both with the reference computed in the step; packed with the
prompt computed once and the reference's log-probabilities kept; TRL's DPOTrainer, which pads.

A trainer whose package is absent, or that runs out of memory, is left out, and it is said why; the exit code is 1
where that is ours. Without a GPU only `tiny` runs, in fp32, to show that the script works. Writes JSON.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from one_rank import one_rank
from our_trainer import Kernels, dpo_batch, dpo_objective, our_trainer, sft_batch
from preference import best_packs, padded_packs
from step_peers import megatron_sft, transformers_sft, trl_dpo, trl_sft, trl_sft_with_liger
from step_workload import (
    GEOMETRIES,
    Geometry,
    Pack,
    Result,
    forget,
    make_packs,
    make_pairs,
    matmul_rate,
    measure,
    step_flops,
)

from paralign.engine.backends.ours import Ours
from paralign.engine.data.answers import Group
from paralign.engine.objectives import SFT
from paralign.models import arch_from_hf


def ours_sft(
    geometry: Geometry, packs: list[Pack], device: torch.device, dtype: str, steps: int, *, kernels: Kernels
) -> Result:
    """Paralign's own SFT step."""
    batch = sft_batch(packs, geometry.tokens_per_pack, device)
    with our_trainer(geometry, len(packs), dtype, kernels) as trainer:
        return measure(partial(trainer.step, batch, SFT()), steps, device)


def ours_dpo(
    geometry: Geometry,
    pairs: Sequence[Group],
    device: torch.device,
    dtype: str,
    steps: int,
    *,
    way: Literal["padded", "packed", "shared"],
) -> Result:
    """Paralign's DPO step; `shared` computes a prompt once and keeps the reference's log-probabilities."""
    if way == "padded":
        pack = partial(padded_packs, device=device)
    else:
        pack = partial(best_packs, device=device, tokens_per_pack=geometry.tokens_per_pack)
    batch = dpo_batch(pairs, pack, share_prefix=way == "shared")
    with our_trainer(geometry, len(batch.micro_batches), dtype, reference=True) as trainer:
        assert trainer.reference is not None
        trainer.reference.fill(batch)
        if way == "shared":
            trainer.reference = None  # and out of memory

        def train() -> float:
            if trainer.reference is not None:
                trainer.reference.fill(batch)
            return trainer.step(batch, dpo_objective())

        return measure(train, steps, device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed SFT and DPO steps beside other trainers.")
    parser.add_argument("--geometry", choices=list(GEOMETRIES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu_step.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = arguments.geometry or ("8b" if device.type == "cuda" else "tiny")
    if device.type == "cpu" and name != "tiny":
        parser.error(f"--geometry {name} needs a GPU; tiny runs without")
    geometry, dtype = GEOMETRIES[name], "bf16" if device.type == "cuda" else "fp32"
    packs, pairs = make_packs(geometry), make_pairs(geometry)
    tokens = sum(len(t) for pack in packs for t, _ in pack)
    rate = matmul_rate(device, torch.bfloat16 if dtype == "bf16" else torch.float32)

    left_out: dict[str, str] = {}

    def run(contenders: dict[str, Callable[..., Result]], data: Any) -> dict[str, Result]:
        results = {}
        for label, contender in contenders.items():
            forget(device)
            try:
                results[label] = contender(geometry, data, device, dtype, arguments.steps)
            except (ImportError, torch.OutOfMemoryError) as error:
                left_out[label] = f"{type(error).__name__}: {error}"
                print(f"{label}: left out, {left_out[label]}")
        return results

    with one_rank():
        sft = run(
            {
                "paralign": partial(ours_sft, kernels="auto"),
                "paralign, kernels: reference": partial(ours_sft, kernels="reference"),
                "megatron-core, local layers": megatron_sft,
                "transformers": transformers_sft,
                "TRL": trl_sft,
                "TRL + Liger": trl_sft_with_liger,
            },
            packs,
        )
        dpo = run(
            {
                "paralign, padded, reference in the step": partial(ours_dpo, way="padded"),
                "paralign, packed, reference in the step": partial(ours_dpo, way="packed"),
                "paralign, prompt once, reference kept": partial(ours_dpo, way="shared"),
                "TRL, padded, reference in the step": trl_dpo,
            },
            pairs,
        )
    floor = step_flops(geometry, packs) / rate
    for label, result in sft.items():
        result["tokens_per_second"] = tokens / result["seconds"]
        result["share_of_floor"] = floor / result["seconds"]
        print(
            f"SFT  {label:42}{result['tokens_per_second']:12,.0f} tokens/s{100 * result['share_of_floor']:8.1f} % "
            f"of the floor   first loss {result['first_loss']:.5f}"
        )
    for label, result in dpo.items():
        result["pairs_per_second"] = len(pairs) / result["seconds"]
        print(
            f"DPO  {label:42}{result['pairs_per_second']:12,.2f} pairs/s{'':24}first loss {result['first_loss']:.5f}"
        )
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "no GPU",
        "note": ""
        if device.type == "cuda"
        else "no GPU at hand: tiny geometry in fp32; no figure here counts",
        "kernels": Ours().facts(arch_from_hf(geometry.config()), device, torch.float32)["kernels"],
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "geometry": name,
        "matmul_tflops": rate / 1e12,
        "tokens_per_step": tokens,
        "pairs_per_step": len(pairs),
        "sft": sft,
        "dpo": dpo,
        "left_out": left_out,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n")
    raise SystemExit(any(label.startswith("paralign") for label in left_out))


if __name__ == "__main__":
    main()
