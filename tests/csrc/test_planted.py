"""Bugs planted in the shipped kernels, which the harness must see: what it would let pass, it does not test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from paralign.engine.kernels.library import KernelLibrary
from paralign.engine.kernels.rms_norm import _backward as backward_ref
from paralign.engine.kernels.rms_norm import launch_backward, launch_forward, rms_norm_ref

from .conftest import ORDERS, set_order


def verdict(library: KernelLibrary) -> set[str]:
    """Everything that was seen to be wrong in any thread order: teams of one warp, of eight lanes, of a block."""
    torch.manual_seed(0)
    found = set()
    for (rows, hidden), order in product([(5, 512), (70, 128), (2, 12500)], ORDERS):
        x, dy, weight = torch.randn(rows, hidden), torch.randn(rows, hidden), torch.randn(hidden)
        set_order(library, order)
        try:
            normed, _, rstd = launch_forward(library, x, None, weight, 1e-5)
            gradients = launch_backward(library, x, weight, rstd, dy, None)
        except RuntimeError as error:
            found.add(str(error).split(": ", 1)[1].split("; called with")[0])
            continue
        actual = torch.cat([normed, gradients[0], gradients[1][None]])
        true_rstd = torch.rsqrt(x.square().mean(-1) + 1e-5)
        wanted = backward_ref(x, weight, true_rstd, dy, None)
        expected = torch.cat([rms_norm_ref(x, weight, 1e-5), wanted[0], wanted[1][None]])
        if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-4):
            found.add("wrong")
    return found


STORE = "  if (lane == 0) scratch[warp] = x;\n  __syncthreads();\n  x = warp_sum("
ROW = "const int end = row < rows ? packs : 0;"
BUGS = {
    "missing barrier before the read": (
        "common/reduce.cuh",
        STORE,
        STORE.replace("__syncthreads();", ""),
        "wrong",
    ),
    "missing barrier before scratch is used again": (
        "common/reduce.cuh",
        "  __syncthreads();  // the caller may use scratch again\n",
        "",
        "wrong",
    ),
    "barrier inside a branch": (
        "common/reduce.cuh",
        STORE,
        STORE.replace("scratch[warp] = x;\n  __syncthreads();", "{ scratch[warp] = x; __syncthreads(); }"),
        "a shuffle that not every lane reaches|a barrier that not every thread reaches",
    ),
    "shuffle of part of a warp": (
        "common/reduce.cuh",
        "kAllLanes = 0xffffffffu",
        "kAllLanes = 0x0000ffffu",
        "a shuffle of part of a warp, which is not covered",
    ),
    "sum over half a warp": ("common/reduce.cuh", "kWarp / 2", "kWarp / 4", "wrong"),
    "shared memory read before it is written": (
        "rmsnorm.cu",
        "own[(pack / team * N + e) * stride] = 0.0f;",
        "{}",
        "wrong",
    ),
    "wrong stride between rows": ("rmsnorm.cu", "start = row * packs", "start = row * (packs - 1)", "wrong"),
    "sum over the neighbouring rows of a warp": (
        "common/reduce.cuh",
        "step = team / 2",
        "step = team",
        "wrong",
    ),
    "sums of other warps' row": ("common/reduce.cuh", "warp / warps * warps + lane", "lane", "wrong"),
    "missing barrier before the teams' sums are added up": (
        "rmsnorm.cu",
        "  __syncthreads();  // before what other teams",
        "  // before what other teams",
        "wrong",
    ),
    "teams without a row stay away from a barrier": (
        "rmsnorm.cu",
        ROW,
        f"{ROW} if (!end) break;",
        "a shuffle that not every lane reaches|a barrier that not every thread reaches",
    ),
    "more shared memory than was asked for": (
        "rmsnorm.cu",
        "cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)",
        "cudaFuncAttributeMaxDynamicSharedMemorySize, 0)",
        "an invalid launch configuration",
    ),
    "more threads than a block may have": (
        "rmsnorm.cu",
        "return kMaxThreads / team * team;",
        "return kMaxThreads * team;",
        "an invalid launch configuration",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_seen(name: str, planted: Callable[..., Path]) -> None:
    file, old, new, expected = BUGS[name]
    found = verdict(KernelLibrary(planted("rmsnorm.cu", file, old, new), lambda: 0))
    assert found & set(expected.split("|")), f"seen: {found or 'nothing'}"


def test_nothing_is_seen_where_nothing_is_planted(cpu_library: KernelLibrary) -> None:
    assert verdict(cpu_library) == set()


SANITIZED = """
import sys
from pathlib import Path
import torch
from paralign.engine.kernels.library import KernelLibrary
from paralign.engine.kernels.rms_norm import launch_backward, launch_forward
library = KernelLibrary(Path(sys.argv[1]), lambda: 0)
for hidden in (64, 9):
    x, weight = torch.randn(3, hidden), torch.randn(hidden)
    normed, _, rstd = launch_forward(library, x, None, weight, 1e-5)
    launch_backward(library, x, weight, rstd, normed, None)
print("clean")
"""


@pytest.mark.parametrize("bug", [False, True], ids=["as shipped", "one pack too many"])
def test_under_an_address_sanitizer(bug: bool, planted: Callable[..., Path], tmp_path: Path) -> None:
    old = "pack < packs; pack += team)\n    for (int e = 0; e < N; ++e) own"
    new = old.replace("packs", "packs + team", 1) if bug else old
    path = planted("rmsnorm.cu", "rmsnorm.cu", old, new, "-fsanitize=address", "-g")
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    environment = os.environ | {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    ended = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(path)], env=environment, capture_output=True, text=True
    )
    if bug:
        assert "heap-buffer-overflow" in ended.stderr
    else:
        assert ended.stdout == "clean\n", ended.stderr[-2000:]
