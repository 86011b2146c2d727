"""The shipped kernels compiled for the CPU, and copies with a bug planted in them. Owns compilers, no tests."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paralign.engine.kernels.library import SOURCES, KernelLibrary, source_files

HERE = Path(__file__).parent
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


def compile_for_cpu(sources: Sequence[Path], output: Path, *options: str) -> list[Path]:
    """Object files of kernels, for the CPU; linked into `output` with what else a library needs."""

    def one(path: Path) -> Path:
        target = output.parent / f"{path.stem}.o"
        command = ["g++", "-std=c++17", "-fPIC", "-fno-gnu-unique", f"-I{HERE}", *options]
        language = ["-x", "c++", '-DPARALIGN_SOURCES="cpu"', "-c", str(path), "-o", str(target)]
        subprocess.run([*command, *language], check=True, capture_output=True, text=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def link(objects: Sequence[Path], output: Path, *options: str) -> Path:
    subprocess.run(["g++", "-shared", *options, *map(str, objects), "-o", str(output)], check=True)
    return output


def set_order(library: KernelLibrary, order: str) -> None:
    """In which order the threads of a block run from now on."""
    ctypes.CDLL(str(library.path)).on_cpu_order(ORDERS[order])


@pytest.fixture(scope="session")
def frame(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What every library needs beside its kernels."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("frame")
    return compile_for_cpu([HERE / "on_cpu.cpp", SOURCES / "library.cu"], folder / "frame.so")


@pytest.fixture(scope="session")
def cpu_library(frame: list[Path], tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    kernels = [source for source in source_files() if source.name != "library.cu"]
    return KernelLibrary(link([*frame, *compile_for_cpu(kernels, path, "-O1")], path), lambda: 0)


@pytest.fixture(params=list(ORDERS))
def library(cpu_library: KernelLibrary, request: pytest.FixtureRequest) -> Iterator[KernelLibrary]:
    """The kernels, with their threads in each of the three orders."""
    set_order(cpu_library, request.param)
    yield cpu_library
    set_order(cpu_library, "forward")


@pytest.fixture
def planted(frame: list[Path], tmp_path: Path) -> Callable[..., Path]:
    """Builds one kernel with a text replaced: `planted("rmsnorm.cu", "common/reduce.cuh", old, new, *options)`."""

    def build(kernel: str, file: str, old: str, new: str, *options: str) -> Path:
        folder = tmp_path / "csrc"
        shutil.copytree(SOURCES / "common", folder / "common")
        shutil.copy(SOURCES / kernel, folder / kernel)
        text = (folder / file).read_text()
        assert old in text, f"{file} no longer contains what was to be replaced: {old}"
        (folder / file).write_text(text.replace(old, new))
        # float alone shows a bug as well as all types do, in a third of the time.
        types = folder / "common/numeric.cuh"
        types.write_text(re.sub(r"    case [12]: return .*\n", "", types.read_text()))
        path = tmp_path / "planted.so"
        return link([*frame, *compile_for_cpu([folder / kernel], path, *options)], path, *options)

    return build
