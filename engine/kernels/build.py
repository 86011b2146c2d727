"""Compiles csrc into the library of kernels. library.py finds the result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paralign.models.errors import ParalignError

from .library import LIBRARY, SOURCES, source_files, sources_digest

# A100, H100 and H200, B200; the last one's PTX too, which a driver compiles for whatever comes later.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


class BuildError(ParalignError):
    """The kernels cannot be built here."""


def find_nvcc() -> Path | None:
    """nvcc, from CUDA_HOME or from PATH."""
    home = os.environ.get("CUDA_HOME")
    named = Path(home) / "bin" / "nvcc" if home else None
    if named is not None and named.exists():
        return named
    found = shutil.which("nvcc")
    return Path(found) if found else None


def compile_command(nvcc: Path, source: Path, output: Path, architectures: Sequence[str]) -> list[str]:
    """nvcc's command for one file."""
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in architectures]
    newest = architectures[-1][3:]
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return [
        *(str(nvcc), "-O3", "-std=c++17", *targets, "-Xcompiler", "-fPIC,-fvisibility=hidden"),
        *(f'-DPARALIGN_SOURCES="{sources_digest(SOURCES)}"', "-c", str(source), "-o", str(output)),
    ]


def build(
    *,
    architectures: Sequence[str] = ARCHITECTURES,
    output: Path = LIBRARY,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Compile every kernel and link them; two files at a time.

    Args:
        architectures: such as ("sm_90",), oldest first.
        progress: told of each file that is done.

    Raises:
        BuildError: nvcc is absent, or refuses a file.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("kernels build: no nvcc on PATH; install the CUDA toolkit, or set CUDA_HOME to it")
    output.parent.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        target = output.parent / f"{source.stem}.o"
        _run(compile_command(nvcc, source, target, architectures))
        progress(f"compiled {source.name}")
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(one, source_files()))
    # Under another name first: a process that has the old library loaded must not see it change.
    unfinished = output.with_suffix(".unfinished")
    _run([str(nvcc), "-shared", *map(str, objects), "-o", str(unfinished)])
    for path in objects:
        path.unlink()
    facts = {"architectures": [*architectures, f"PTX {architectures[-1][3:]}"], "sources": sources_digest()}
    output.with_suffix(".json").write_text(json.dumps(facts) + "\n")
    unfinished.replace(output)
    return output


def _run(command: Sequence[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise BuildError(f"kernels build: {' '.join(command)}\n{ended.stderr.strip()}")
