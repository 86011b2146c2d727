"""Directories of Llama-3-8B layer shapes, or narrower, with random weights; processes watched from outside.

python benchmarks/llama_directory.py DIRECTORY LAYERS VOCABULARY SEED HIDDEN DTYPE
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paralign.engine.checkpoint.target import HFTarget
from paralign.models import arch_from_hf, rules_for
from paralign.models.weights import BLOCK, Views


def make_directory(
    directory: Path,
    *,
    layers: int,
    vocabulary: int,
    seed: int,
    hidden: int = 4096,
    dtype: str = "bfloat16",
) -> int:
    """Writes a Hugging Face directory in a process of its own; returns the bytes of its tensors."""
    arguments = (directory, layers, vocabulary, seed, hidden, dtype)
    return int(watch([sys.executable, __file__, *map(str, arguments)]).output)


def write_directory(
    directory: Path, layers: int, vocabulary: int, seed: int, hidden: int, dtype: torch.dtype
) -> int:
    """Writes a Hugging Face directory, tensor by tensor; returns the bytes of its tensors."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    rules = rules_for(arch_from_hf(config))
    target = HFTarget(directory, rules, dtype=dtype, max_shard_bytes=10**9)
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.empty(BLOCK)

    def random(count: int) -> Iterator[Tensor]:
        for start in range(0, count, BLOCK):
            block = buffer[: min(BLOCK, count - start)]
            # uniform: a tenth of the time of normal draws
            yield (
                torch.rand(block.shape, out=block, generator=generator)
                .sub_(0.5)
                .mul_(0.04)
                .to(dtype, copy=True)
            )

    def tensors(file: str) -> Iterator[tuple[str, Views]]:
        for rule, names in target.content[file]:
            for name in names:
                yield name, random(math.prod(rule.shapes[name]))

    for file in target.files:
        target.write(file, tensors(file))
    target.finish()
    return target.tensor_bytes


@dataclass(frozen=True)
class Run:
    """A process: wall seconds, peak resident bytes, and what it printed."""

    seconds: float
    peak: int
    output: str


def watch(command: Sequence[str], **environment: str) -> Run:
    """Runs a command to its end; raises RuntimeError with its output if it fails.

    Linux counts what the parent held at the fork into a child's peak: keep the parent small.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output}")
    return Run(time.monotonic() - began, usage.ru_maxrss * 1024, output)


if __name__ == "__main__":
    folder, *numbers, dtype_name = sys.argv[1:]
    print(write_directory(Path(folder), *map(int, numbers), getattr(torch, dtype_name)))
