"""nvcc takes every kernel for every architecture within its budget of registers, and the result can be loaded."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from paralign.engine.kernels.build import ARCHITECTURES, compile_command, find_nvcc
from paralign.engine.kernels.library import KernelLibrary, source_files, sources_digest
from paralign.engine.kernels.swiglu import launch_forward

REGISTERS = 65536  # of a multiprocessor, on every architecture that is built
# Threads of a kernel's block, and how many such blocks' registers must fit a multiprocessor.
BUDGETS = {
    ("adamw", "squared_sum"): (256, 8),
    ("adamw", "adamw"): (256, 4),
    ("library", "nothing"): (1, 32),
    ("rmsnorm", "forward"): (256, 3),
    ("rmsnorm", "backward"): (256, 2),
    ("rope", "rotate"): (288, 3),
    ("swiglu", "forward"): (256, 4),
    ("swiglu", "backward"): (256, 4),
    ("vocab", "partials"): (256, 4),
    ("vocab", "gradient"): (256, 4),
}


def over_budget(report: str, file: str) -> list[str]:
    """Kernels in what ptxas says of a file that spill, or whose registers are not within their budget."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?\n.*?\n\s*(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers",
        report,
    )
    assert len(found) == report.count("Compiling entry function") > 0
    over = []
    for symbol, architecture, frame, *spilled, used in found:
        # A mangled name holds the length of each part before it.
        (kernel,) = (k for f, k in BUDGETS if f == file and f"{len(k)}{k}" in symbol)
        threads, blocks = BUDGETS[file, kernel]
        by_eight, warps = -(-int(used) // 8) * 8, -(-threads // 32)  # as they are given out
        # An array that is not in registers shows as a frame; sincosf has one, for angles above 105615.
        in_memory = spilled != ["0", "0"] or (frame != "0" and kernel != "rotate")
        if by_eight * 32 * warps * blocks > REGISTERS or in_memory:
            over.append(
                f"{file}.cu, {kernel} on {architecture}, {symbol}: {used} registers, frame of {frame} bytes"
            )
    return over


def test_every_kernel_compiles_within_its_registers_and_loads(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")

    def one(source: Path) -> tuple[str, Path]:
        output = tmp_path / f"{source.stem}.o"
        command = compile_command(nvcc, source, output, ARCHITECTURES)
        ended = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stderr, output

    with ThreadPoolExecutor(2) as pool:
        reports, objects = zip(*pool.map(one, source_files()), strict=True)
    over = [
        line for source, report in zip(source_files(), reports) for line in over_budget(report, source.stem)
    ]
    assert not over, "\n".join(over)

    path = tmp_path / "kernels.so"
    subprocess.run([str(nvcc), "-shared", *map(str, objects), "-o", str(path)], check=True)
    library = KernelLibrary(path, lambda: 0)
    assert library.sources == sources_digest()
    if not torch.cuda.is_available():  # CUDA's own refusal comes through as an error, not as silence
        with pytest.raises(RuntimeError, match=r"kernel swiglu_forward: .*(driver|device)"):
            launch_forward(library, torch.ones(2, 8))
