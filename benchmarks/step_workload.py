"""What the trainers of gpu_step.py are given, and how they are timed. Knows none of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from preference import draw_pairs

from paralign.engine.data.answers import Group
from paralign.engine.data.packing import plan_packs
from paralign.models import arch_from_hf

LR, BETAS, EPS, WEIGHT_DECAY, CLIP, BETA = 1e-5, (0.9, 0.95), 1e-8, 0.1, 1.0, 0.1
PAIRS_PER_BATCH = 4  # of trainers that pad
Pack = list[tuple[list[int], list[bool]]]
Result = dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """A Llama by its sizes, the packs of a step, and the pairs of a preference step."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens_per_pack: int
    packs: int
    pairs: int

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
    "8b": Geometry(8, 4096, 14336, 32, 8, 128256, 8192, 2, 32),
    "70b": Geometry(4, 8192, 28672, 64, 8, 128256, 8192, 2, 32),
    "tiny": Geometry(2, 64, 160, 4, 2, 2048, 256, 2, 4),
}


def make_packs(geometry: Geometry) -> list[Pack]:
    """The packs of one SFT step, repeated; the second half of each sample is learned."""
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


def make_pairs(geometry: Geometry) -> list[Group]:
    """The pairs of one DPO step, of the mix of preference.py."""
    return draw_pairs(geometry.pairs, tokens_per_pack=geometry.tokens_per_pack)


def n_learned(packs: list[Pack]) -> int:
    """Tokens with a loss; a sample's first has nothing before it."""
    return sum(sum(mask[1:]) for pack in packs for _, mask in pack)


def step_flops(geometry: Geometry, packs: list[Pack]) -> float:
    """Products of one SFT step without recomputation: forward, and twice that backward."""
    arch = arch_from_hf(geometry.config())
    lengths = [len(tokens) for pack in packs for tokens, _ in pack]
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    forward = tokens * (arch.linear_flops_per_token + arch.attention_flops_per_token(squares / tokens))
    return 3 * (forward + n_learned(packs) * arch.head_flops_per_token)


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


def forget(device: torch.device) -> None:
    """Free what the last trainer held, and begin to count memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def summary(seconds: list[float], losses: list[float], device: torch.device) -> Result:
    """Median step after two to warm up, first loss, peak memory."""
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
    return {"seconds": statistics.median(seconds[2:]), "first_loss": losses[0], **peak}


def measure(train: Callable[[], float], steps: int, device: torch.device) -> Result:
    """Time a function that does one step and returns its loss; on a GPU also where the time goes."""
    losses, seconds = [], []
    for _ in range(steps + 2):
        synchronize(device)
        began = time.perf_counter()
        losses.append(train())
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    result = summary(seconds, losses, device)
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            train()
        longest = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:20]
        result["kernels_ms"] = {event.key[:90]: event.self_device_time_total / 1e3 for event in longest}
    return result
