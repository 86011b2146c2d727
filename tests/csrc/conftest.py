"""The shipped kernels compiled for the CPU, and copies with a bug planted in them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paralign.engine.kernels.library import SOURCES, KernelLibrary, find_library, source_files

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


@dataclass(frozen=True)
class Runner:
    """The kernels somewhere: on the CPU with their threads in some order, or on a GPU."""

    library: KernelLibrary
    device: torch.device

    def __call__(self, launch: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """`launch(library, *arguments)` on tensors there; what it returns and what it changed come back."""
        there = [self.send(x) if isinstance(x, Tensor) else x for x in arguments]
        returned = launch(self.library, *there, **options)
        for ours, theirs in zip(arguments, there, strict=True):
            if theirs is not ours:
                ours.copy_(theirs)
        if isinstance(returned, tuple):
            return tuple(x.cpu() for x in returned)
        return None if returned is None else returned.cpu()

    def send(self, x: Tensor) -> Tensor:
        """The same tensor on the CPU; on a GPU a copy with its strides and at its distance from whole packs."""
        return x if self.device.type == "cpu" else copy_as_it_lies(x, self.device)


def copy_as_it_lies(x: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides, as far from the beginning of its memory."""
    space = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).to(device, copy=True)
    return space.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.fixture(params=[*ORDERS, pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """The kernels in each of the three orders, and on the GPU where there is one."""
    if request.param == "cuda":
        found = find_library()
        if found.library is None:
            pytest.skip(f"the kernels are {found.reason}")
        yield Runner(found.library, torch.device("cuda", torch.cuda.current_device()))
        return
    library = request.getfixturevalue("cpu_library")
    set_order(library, request.param)
    yield Runner(library, torch.device("cpu"))
    set_order(library, "forward")


@pytest.fixture
def planted(frame: list[Path], tmp_path: Path) -> Callable[..., Path]:
    """Builds one kernel with a text replaced: `planted("rmsnorm.cu", "common/reduce.cuh", old, new, *options)`.

    `types` are the codes of the element types that it is built for: one shows a bug as well as all three do, in a
    third of the time.
    """

    def build(kernel: str, file: str, old: str, new: str, *options: str, types: str = "0") -> Path:
        folder = tmp_path / "csrc"
        shutil.copytree(SOURCES / "common", folder / "common")
        shutil.copy(SOURCES / kernel, folder / kernel)
        text = (folder / file).read_text()
        assert old in text, f"{file} no longer contains what was to be replaced: {old}"
        (folder / file).write_text(text.replace(old, new))
        chosen = folder / "common/numeric.cuh"
        chosen.write_text(re.sub(rf"    case [^{types}]: return .*\n", "", chosen.read_text()))
        path = tmp_path / "planted.so"
        return link([*frame, *compile_for_cpu([folder / kernel], path, *options)], path, *options)

    return build
