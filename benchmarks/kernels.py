"""Times every fused operation beside torch eager, torch.compile and Liger, as shares of what the device can do.

    python benchmarks/kernels.py [--tiny] [--repeats 10] [--output benchmarks/results/kernels.json]

Shapes are those of Llama-3-8B and of one of eight tensor-parallel ranks of Llama-3-70B, 8192 rows, bf16; first come
RMSNorm, RMSNorm of heads of 128, and RoPE of 16 + 2 heads, the kernels whose speed is least sure. Operations that
move memory are given as a share of the copy bandwidth measured in the same run; products as a share of the bare
matrix products that they need. Without a GPU only `--tiny` shapes run (and are chosen), to show that the script
works: there the reference is timed against itself, and the shares mean nothing.

Writes JSON, and a plot beside it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paralign.engine.kernels.adamw import adamw_, clip_factor, squared_sum
from paralign.engine.kernels.library import find_library
from paralign.engine.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from paralign.engine.kernels.rope import rope, rope_ref
from paralign.engine.kernels.swiglu import swiglu, swiglu_ref
from paralign.engine.kernels.token_statistics import WORKSPACE_BYTES, token_statistics
from paralign.models.weight_gradient import accumulate


@dataclass(frozen=True)
class Shape:
    """One rank's share of a model; `parameters` is what one optimizer call updates."""

    name: str
    rows: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    parameters: int
    channels: int = 128


FIRST = Shape("16 + 2 heads", 8192, 8192, 0, 16, 2, 0, 0)
SHAPES = [
    Shape("Llama-3-8B", 8192, 4096, 14336, 32, 8, 128256, 2**27),
    Shape("Llama-3-70B, 1 of TP8", 8192, 8192, 3584, 8, 1, 16032, 2**27),
]
TINY_FIRST = Shape("tiny, 16 + 2 heads", 64, 64, 0, 16, 2, 0, 0, channels=16)
TINY = [Shape("tiny", 64, 64, 96, 4, 2, 320, 2**12, channels=16)]


@dataclass(frozen=True)
class Result:
    """One timing; `share` of the floor: copy bandwidth, or bare matrix products."""

    operation: str
    shape: str
    direction: str
    implementation: str
    milliseconds: float
    share: float
    extra_bytes: int | None  # peak over what was allocated before; None without a GPU


class Clock:
    """Medians over repeats, by CUDA events where there is a GPU."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, run: Callable[[], object]) -> tuple[float, int | None]:
        """(milliseconds, extra bytes); three runs warm up."""
        for _ in range(3):
            run()
        if self.device.type != "cuda":
            times = []
            for _ in range(self.repeats):
                began = time.perf_counter()
                run()
                times.append((time.perf_counter() - began) * 1e3)
            return statistics.median(times), None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for first, last in events:
            first.record()
            run()
            last.record()
        torch.cuda.synchronize()
        milliseconds = statistics.median(first.elapsed_time(last) for first, last in events)
        return milliseconds, torch.cuda.max_memory_allocated() - before


Candidate = tuple[str, Callable[..., Any]]


def candidates(
    ours: Callable[..., Any], reference: Callable[..., Any], device: torch.device
) -> list[Candidate]:
    """Ours, torch eager, and torch.compile where it has a GPU to compile for."""
    found: list[Candidate] = [("paralign", ours), ("torch eager", reference)]
    if device.type == "cuda":
        found.append(("torch.compile", torch.compile(reference, dynamic=False)))
    return found


def has_liger(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def outputs_of(returned: Any) -> list[Tensor]:
    return list(returned) if isinstance(returned, tuple) else [returned]


def time_memory_bound(
    name: str,
    shape: Shape,
    inputs: list[Tensor],
    found: list[Candidate],
    traffic: tuple[int, int],
    bandwidth: float,
    clock: Clock,
) -> list[Result]:
    """Forward, and backward alone over a kept graph. `traffic`: bytes each must move."""
    results = []
    for implementation, function in found:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.no_grad():
            milliseconds, extra = clock(partial(function, *leaves))
        share = traffic[0] / bandwidth / (milliseconds / 1e3)
        results.append(Result(name, shape.name, "forward", implementation, milliseconds, share, extra))
        outputs = outputs_of(function(*leaves))
        gradients = [torch.ones_like(x) for x in outputs]
        milliseconds, extra = clock(
            partial(torch.autograd.grad, outputs, leaves, gradients, retain_graph=True)
        )
        share = traffic[1] / bandwidth / (milliseconds / 1e3)
        results.append(Result(name, shape.name, "backward", implementation, milliseconds, share, extra))
    return results


def norm(
    name: str, shape: Shape, width: int, rows: int, device: torch.device, bandwidth: float, clock: Clock
) -> list[Result]:
    """RMSNorm of rows of this width."""
    make, eps = partial(torch.randn, device=device, dtype=torch.bfloat16), 1e-5
    found = candidates(lambda x, w: rms_norm(x, w, eps), lambda x, w: rms_norm_ref(x, w, eps), device)
    if has_liger(device):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        found.append(("Liger", lambda x, w: LigerRMSNormFunction.apply(x, w, eps)))
    traffic = 4 * rows * width, 6 * rows * width
    return time_memory_bound(name, shape, [make(rows, width), make(width)], found, traffic, bandwidth, clock)


def rotary(shape: Shape, device: torch.device, bandwidth: float, clock: Clock) -> list[Result]:
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    positions = torch.arange(shape.rows, device=device) % 1024
    frequencies = 5e5 ** -torch.linspace(0, 1, shape.channels // 2, device=device)
    found = candidates(
        lambda q, k: rope(q, k, positions, frequencies),
        lambda q, k: rope_ref(q, k, positions, frequencies),
        device,
    )
    inputs = [make(shape.rows, heads, shape.channels) for heads in (shape.heads, shape.kv_heads)]
    moved = 4 * shape.rows * (shape.heads + shape.kv_heads) * shape.channels
    return time_memory_bound("RoPE", shape, inputs, found, (moved, moved), bandwidth, clock)


def least_sure(shape: Shape, device: torch.device, bandwidth: float, clock: Clock) -> list[Result]:
    """Rows of a model, rows of its heads (Qwen3 has a norm for them), and RoPE."""
    heads = shape.rows * shape.heads
    return [
        *norm("RMSNorm", shape, shape.hidden, shape.rows, device, bandwidth, clock),
        *norm("RMSNorm of heads", shape, shape.channels, heads, device, bandwidth, clock),
        *rotary(shape, device, bandwidth, clock),
    ]


def memory_bound(shape: Shape, device: torch.device, bandwidth: float, clock: Clock) -> list[Result]:
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    rows, hidden, eps = shape.rows, shape.hidden, 1e-5
    element = 2 * rows  # bytes of a column
    results = norm("RMSNorm", shape, hidden, rows, device, bandwidth, clock)

    found = candidates(
        lambda x, r, w: add_rms_norm(x, r, w, eps), lambda x, r, w: add_rms_norm_ref(x, r, w, eps), device
    )
    inputs = [make(rows, hidden), make(rows, hidden), make(hidden)]
    traffic = 4 * element * hidden, 4 * element * hidden
    results += time_memory_bound("add + RMSNorm", shape, inputs, found, traffic, bandwidth, clock)

    found = candidates(swiglu, swiglu_ref, device)
    if has_liger(device):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        # Liger takes gate and up apart; the split of a joint projection is part of the work.
        found.append(
            ("Liger", lambda x: LigerSiLUMulFunction.apply(*(h.contiguous() for h in x.chunk(2, -1))))
        )
    traffic = 3 * element * shape.ffn, 5 * element * shape.ffn
    results += time_memory_bound(
        "SwiGLU", shape, [make(rows, 2 * shape.ffn)], found, traffic, bandwidth, clock
    )
    return results + rotary(shape, device, bandwidth, clock)


def optimizer(shape: Shape, device: torch.device, bandwidth: float, clock: Clock) -> list[Result]:
    """Clip and update together: 34 bytes a parameter."""
    flat = [torch.rand(shape.parameters, device=device) for _ in range(4)]
    low = flat[0].bfloat16()
    settings: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    def ours() -> None:
        adamw_(*flat, low, clip_factor(squared_sum(flat[1]), 1.0), **settings, step=3)

    parameter = torch.nn.Parameter(flat[0].clone())
    parameter.grad = flat[1]
    theirs = torch.optim.AdamW([parameter], fused=True, **settings)

    def eager() -> None:
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        theirs.step()
        low.copy_(parameter.detach())

    results = []
    for implementation, function in (("paralign", ours), ("torch eager", eager)):
        milliseconds, extra = clock(function)
        share = 34 * shape.parameters / bandwidth / (milliseconds / 1e3)
        results.append(
            Result("clip + AdamW", shape.name, "update", implementation, milliseconds, share, extra)
        )
    return results


def products(shape: Shape, device: torch.device, clock: Clock) -> list[Result]:
    """The head, forward and backward, and one weight gradient: against the bare products that they need.

    Ours adds the weight's gradient to an fp32 buffer, as in training, where the peers make one in bf16.
    """
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    hidden, weight = make(shape.rows, shape.hidden), make(shape.vocabulary, shape.hidden) / shape.hidden**0.5
    main_grad = torch.zeros(shape.vocabulary, shape.hidden, device=device)
    labels = torch.randint(0, shape.vocabulary, (shape.rows,), device=device)
    chunk = max(1, min(shape.rows, WORKSPACE_BYTES // (2 * shape.vocabulary)))
    results = []

    def bare(products: int) -> None:
        for start in range(0, shape.rows, chunk):
            part = hidden[start : start + chunk]
            logits = part @ weight.t()
            if products == 4:
                logits = part @ weight.t()
            logits @ weight
            logits.t() @ part

    def head(loss: Callable[[Tensor, Any], Tensor]) -> None:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        torch.autograd.grad(loss(*leaves), leaves)

    def ours(hidden: Tensor, weight: Any, row_gradient: Tensor | None = None) -> Tensor:
        weight.main_grad, weight.grad_added_to_main_grad = main_grad, False
        found = token_statistics(
            hidden, weight, labels, vocab_size=shape.vocabulary, row_gradient=row_gradient
        )
        return -found.logprob_R.mean()

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.t()).float(), labels)

    found: list[tuple[str, int, Callable[..., Tensor]]] = [
        ("paralign", 3 if chunk == shape.rows else 4, ours),
        (
            "paralign, known",
            3,
            partial(ours, row_gradient=torch.full_like(labels, -1 / shape.rows, dtype=torch.float32)),
        ),
        ("torch eager", 3, eager),
    ]
    if device.type == "cuda":
        found.append(("torch.compile", 3, torch.compile(eager, dynamic=False)))
    if has_liger(device):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found.append(("Liger", 3, lambda h, w: liger_fused_linear_cross_entropy(h, w, labels)))
    floors = {needed: clock(partial(bare, needed))[0] for needed in (3, 4)}
    for implementation, needed, loss in found:
        milliseconds, extra = clock(partial(head, loss))
        share = floors[needed] / milliseconds
        results.append(Result("head", shape.name, "both", implementation, milliseconds, share, extra))

    gradient, main_grad = make(shape.rows, shape.ffn), torch.zeros(shape.ffn, shape.hidden, device=device)
    floor, _ = clock(lambda: gradient.t() @ hidden)
    for implementation, function in (
        ("paralign", lambda: accumulate(hidden, gradient, main_grad)),
        ("torch eager", lambda: main_grad.add_(gradient.t() @ hidden)),
    ):
        milliseconds, extra = clock(function)
        results.append(
            Result(
                "weight gradient",
                shape.name,
                "backward",
                implementation,
                milliseconds,
                floor / milliseconds,
                extra,
            )
        )
    return results


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes a second of a copy, counted read and written."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds, _ = clock(lambda: target.copy_(source))
    return 2 * source.numel() / (milliseconds / 1e3)


def draw(results: list[Result], path: Path) -> None:
    """Shares of the floor, a panel for each shape."""
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(r.shape for r in results))
    figure, axes = plt.subplots(len(shapes), 1, figsize=(11, 4 * len(shapes)), squeeze=False)
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        rows = [r for r in results if r.shape == shape]
        labels = list(dict.fromkeys(f"{r.operation}\n{r.direction}" for r in rows))
        implementations = list(dict.fromkeys(r.implementation for r in rows))
        width = 0.8 / len(implementations)
        for i, implementation in enumerate(implementations):
            mine = [r for r in rows if r.implementation == implementation]
            places = [labels.index(f"{r.operation}\n{r.direction}") + i * width for r in mine]
            axis.bar(places, [100 * r.share for r in mine], width, label=implementation)
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(labels))], labels, fontsize=7)
        axis.set_ylabel("% of the floor")
        axis.set_title(shape)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fused operations as shares of what the device can do.")
    parser.add_argument("--tiny", action="store_true", help="Small shapes; the only ones without a GPU.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = arguments.tiny or device.type == "cpu"
    torch.manual_seed(0)
    clock = Clock(device, arguments.repeats)
    bandwidth = copy_bandwidth(device, clock)
    results = least_sure(TINY_FIRST if tiny else FIRST, device, bandwidth, clock)
    for shape in TINY if tiny else SHAPES:
        results += memory_bound(shape, device, bandwidth, clock)
        results += optimizer(shape, device, bandwidth, clock)
        results += products(shape, device, clock)
    for r in results:
        print(
            f"{r.shape:24}{r.operation:17}{r.direction:10}{r.implementation:15}{r.milliseconds:10.3f} ms"
            f"{100 * r.share:8.1f} %"
        )
    found = find_library()
    report = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"no GPU ({platform.machine()})",
        "note": ""
        if device.type == "cuda"
        else "no GPU at hand: tiny shapes, references only; no figure here counts",
        "kernels": "CUDA" if found.library else f"reference ({found.reason})",
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "results": [asdict(r) for r in results],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    draw(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
