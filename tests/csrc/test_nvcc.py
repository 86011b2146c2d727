"""nvcc takes every kernel for every architecture, no kernel spills registers, and the result can be loaded."""

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


def test_every_kernel_compiles_without_spills_and_loads(tmp_path: Path) -> None:
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
    kernels = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", "".join(reports))
    assert len(kernels) > 50
    assert set(kernels) == {("0", "0")}

    path = tmp_path / "kernels.so"
    subprocess.run([str(nvcc), "-shared", *map(str, objects), "-o", str(path)], check=True)
    library = KernelLibrary(path, lambda: 0)
    assert library.sources == sources_digest()
    if not torch.cuda.is_available():  # CUDA's own refusal comes through as an error, not as silence
        with pytest.raises(RuntimeError, match=r"kernel swiglu_forward: .*(driver|device)"):
            launch_forward(library, torch.ones(2, 8))
