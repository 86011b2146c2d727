"""Times a packed SFT training step on one device, as a share of the floor that its matrix products set.

    python benchmarks/gpu_step.py [--geometry 8b|70b|tiny] [--steps 8] [--output benchmarks/results/gpu_step.json]

`8b` is Llama-3-8B with 16 layers, `70b` is Llama-3-70B with 4 (weights, fp32 gradients and optimizer need about
18 bytes for each of its 5.5 G parameters: a device of 141 GB). Lengths follow an SFT mix: log-normal, median 350,
σ 1.1, clipped to 16 … the pack's length. Timed: forward, backward, clipping and AdamW. Three trainers on the same
packs, in the same run: ours as recipes run it, ours with `kernels: reference`, and transformers' model (with
Liger's kernels where they are installed) under torch's fused AdamW.

The floor counts products only, forward and twice that backward, at the rate of a large bf16 product measured in
the same run. Without a GPU only `tiny` runs, in fp32, to show that the script works.

Writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from paralign.engine.batch import StepBatch, Unit
from paralign.engine.build import (
    build_chunks,
    load_weights,
    random_weights,
    transformer_config,
    wrap_for_data_parallel,
)
from paralign.engine.data.loader import pack_batch
from paralign.engine.data.packing import plan_packs
from paralign.engine.kernels.parts import choose_parts, describe_kernels
from paralign.engine.layout import LayoutConfig, resolve
from paralign.engine.mesh import open_mesh, open_world
from paralign.engine.model import ModelConfig
from paralign.engine.objectives import SFT
from paralign.engine.optim import Optimizer
from paralign.engine.schedule import OptimizerConfig
from paralign.engine.step import run_step
from paralign.models import arch_from_hf

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-5, (0.9, 0.95), 1e-8, 0.1, 1.0
Pack = list[tuple[list[int], list[bool]]]
Train = Callable[[], float]  # one step; its loss


@dataclass(frozen=True)
class Geometry:
    """A Llama by its sizes, and the packs of a step."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens_per_pack: int
    packs: int

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": self.tokens_per_pack,
            "rope_theta": 5e5,
            "tie_word_embeddings": False,
        }


GEOMETRIES = {
    "8b": Geometry(16, 4096, 14336, 32, 8, 128256, 8192, 2),
    "70b": Geometry(4, 8192, 28672, 64, 8, 128256, 8192, 2),
    "tiny": Geometry(2, 64, 160, 4, 2, 512, 256, 2),
}


def make_packs(geometry: Geometry) -> list[Pack]:
    """The packs of one step, repeated; the second half of each sample is learned."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(350), 1.1, 40 * geometry.packs)
    lengths = np.clip(lengths, 16, geometry.tokens_per_pack).astype(np.int64)
    plan = plan_packs(lengths, geometry.tokens_per_pack, seed=0, epoch=0)
    return [
        [
            (
                generator.integers(0, geometry.vocabulary, lengths[i]).tolist(),
                (np.arange(lengths[i]) >= lengths[i] // 2).tolist(),
            )
            for i in plan.pack(p)
        ]
        for p in range(geometry.packs)
    ]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product in the precision of the run."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times[3:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_flops(geometry: Geometry, packs: list[Pack]) -> float:
    """Products of one step without recomputation: forward, and twice that backward."""
    arch = arch_from_hf(geometry.config())
    lengths = [len(tokens) for pack in packs for tokens, _ in pack]
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    learned = sum(sum(mask[1:]) for pack in packs for _, mask in pack)
    forward = tokens * (arch.linear_flops_per_token + arch.attention_flops_per_token(squares / tokens))
    return 3 * (forward + learned * arch.head_flops_per_token)


@contextlib.contextmanager
def ours(
    geometry: Geometry, packs: list[Pack], kernels: Literal["auto", "reference"], dtype: str
) -> Iterator[Train]:
    """Paralign on one rank."""
    arch = arch_from_hf(geometry.config())
    keys = LayoutConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    layout = resolve(
        keys, arch, world_size=1, global_batch_size=len(packs), tokens_per_pack=geometry.tokens_per_pack
    )
    model = ModelConfig(hf=Path(), dtype=dtype, kernels=kernels)  # type: ignore[arg-type]
    settings = OptimizerConfig(
        lr=LR,
        lr_decay_style="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=CLIP,
    )
    with open_mesh(layout, local_rank=0, seed=0) as mesh:
        config = transformer_config(arch, layout, model)
        chunks = build_chunks(config, arch, mesh, choose_parts(kernels))
        precision = config.params_dtype
        load_weights(chunks, arch, mesh, random_weights(arch, seed=0, dtype=precision, device=mesh.device))
        wrapped = wrap_for_data_parallel(chunks, config, layout)
        optimizer = Optimizer(wrapped, settings, layout, precision)
        batch = StepBatch(
            [pack_batch(pack, geometry.tokens_per_pack, mesh.device) for pack in packs],
            {Unit.TOKEN: sum(sum(mask[1:]) for pack in packs for _, mask in pack)},
            n_samples=sum(map(len, packs)),
            n_tokens=0,
            sample_ids=(),
        )

        def train() -> float:
            optimizer.zero_grad()
            sums = run_step(wrapped, batch, SFT(), mesh, train=True)
            optimizer.step(LR)
            return (sums[0, 0] / sums[0, 1]).item()

        yield train


@contextlib.contextmanager
def transformers_model(
    geometry: Geometry, packs: list[Pack], device: torch.device, dtype: str
) -> Iterator[Train]:
    """transformers' Llama on the same packs, isolated by positions that restart; Liger's kernels if installed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    keys = {key: value for key, value in geometry.config().items() if key != "architectures"}
    attention = "flash_attention_2" if flash else "sdpa"
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**keys, attn_implementation=attention))
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    learned = sum(sum(mask[1:]) for pack in packs for _, mask in pack)
    rows = []
    for pack in packs:
        columns = {
            "input_ids": [token for tokens, _ in pack for token in tokens],
            "position_ids": [i for tokens, _ in pack for i in range(len(tokens))],
            "labels": [
                token if i and is_learned else -100
                for tokens, mask in pack
                for i, (token, is_learned) in enumerate(zip(tokens, mask))
            ],
        }
        rows.append({name: torch.tensor([column], device=device) for name, column in columns.items()})

    def train() -> float:
        optimizer.zero_grad()
        total = 0.0
        for row in rows:
            loss = model(**row, num_items_in_batch=torch.tensor(learned, device=device)).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    yield train


def measure(train: Train, steps: int, device: torch.device) -> dict[str, Any]:
    """Median step, first loss, peak memory, and on a GPU where the time goes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(steps + 2):
        synchronize(device)
        began = time.perf_counter()
        losses.append(train())
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    result: dict[str, Any] = {"seconds": statistics.median(seconds[2:]), "first_loss": losses[0]}
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            train()
        longest = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:20]
        result["kernels_ms"] = {event.key[:90]: event.self_device_time_total / 1e3 for event in longest}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="A packed SFT step as a share of its products.")
    parser.add_argument("--geometry", choices=list(GEOMETRIES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu_step.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = arguments.geometry or ("8b" if device.type == "cuda" else "tiny")
    if device.type == "cpu" and name != "tiny":
        parser.error(f"--geometry {name} needs a GPU; tiny runs without")
    geometry, dtype = GEOMETRIES[name], "bf16" if device.type == "cuda" else "fp32"
    packs = make_packs(geometry)
    tokens = sum(len(t) for pack in packs for t, _ in pack)
    rate = matmul_rate(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    floor = step_flops(geometry, packs) / rate

    results: dict[str, dict[str, Any]] = {}
    store = torch.distributed.TCPStore("127.0.0.1", 20000 + os.getpid() % 20000, 1, is_master=True)
    with open_world(rank=0, world_size=1, local_rank=0, timeout_minutes=10, store=store):
        for label, trainer in (
            ("paralign", lambda: ours(geometry, packs, "auto", dtype)),
            ("paralign, kernels: reference", lambda: ours(geometry, packs, "reference", dtype)),
            ("transformers", lambda: transformers_model(geometry, packs, device, dtype)),
        ):
            with trainer() as train:
                results[label] = measure(train, arguments.steps, device)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for label, result in results.items():
        result["tokens_per_second"] = tokens / result["seconds"]
        result["share_of_floor"] = floor / result["seconds"]
        print(
            f"{label:30}{result['tokens_per_second']:12,.0f} tokens/s{100 * result['share_of_floor']:8.1f} % of the "
            f"floor   first loss {result['first_loss']:.5f}"
        )
    report = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "no GPU",
        "note": ""
        if device.type == "cuda"
        else "no GPU at hand: tiny geometry in fp32; no figure here counts",
        "kernels": describe_kernels("auto"),
        "peer": {
            package: importlib.util.find_spec(package) is not None
            for package in ("liger_kernel", "flash_attn")
        },
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "geometry": name,
        "matmul_tflops": rate / 1e12,
        "tokens_per_step": tokens,
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
