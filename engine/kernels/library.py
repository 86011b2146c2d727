"""The compiled kernels as Python sees them: found, checked against their sources, called. Compiles nothing.

The library has a C interface of pointers, 64-bit integers and doubles. It includes nothing of torch, so that one
build serves every torch and every Python, and the tests can load the same sources compiled for the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parents[2] / "csrc"
LIBRARY = SOURCES / "build" / "libparalign_kernels.so"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the codes of csrc/common/numeric.cuh


def source_files(sources: Path = SOURCES) -> list[Path]:
    """One file for each operation, in a fixed order."""
    return sorted(sources.glob("*.cu"))


def sources_digest(sources: Path = SOURCES) -> str:
    """What a library is asked for, so that one built from other sources is never called."""
    digest = hashlib.sha256()
    for path in (*source_files(sources), *sorted((sources / "common").iterdir())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class KernelLibrary:
    """A loaded library of kernels.

    Args:
        path: the shared object.
        stream: the stream that a call launches on, as an integer; asked at every call.
    """

    def __init__(self, path: Path, stream: Callable[[], int]) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._stream = stream
        self._library.paralign_sources.restype = ctypes.c_char_p
        self._library.paralign_error.restype = ctypes.c_char_p
        self.sources: str = self._library.paralign_sources().decode()

    def call(self, function: str, *arguments: Tensor | int | float | None) -> None:
        """Launch `paralign_<function>(*arguments, stream)`; tensors go as addresses, None as null.

        Raises:
            ValueError: tensors of more than one device: a kernel cannot read the others' addresses.
            RuntimeError: the launch was refused.
        """
        self._call(function, arguments, ctypes.c_void_p(self._stream()))

    def ask(self, function: str, *arguments: Tensor | int | float | None) -> int:
        """The number that `paralign_<function>(*arguments, &number)` gives; raises what `call` does."""
        number = ctypes.c_int64()
        self._call(function, arguments, ctypes.byref(number))
        return number.value

    def _call(self, function: str, arguments: Sequence[Tensor | int | float | None], last: Any) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if len({x.device for x in tensors}) > 1:
            places = ", ".join(f"{describe(x)} on {x.device}" for x in tensors)
            raise ValueError(f"kernel {function}: tensors of one device; got {places}")
        converted: list[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                converted.append(ctypes.c_void_p(argument.data_ptr()))
            elif isinstance(argument, int):
                converted.append(ctypes.c_int64(argument))
            elif isinstance(argument, float):
                converted.append(ctypes.c_double(argument))
            else:
                converted.append(ctypes.c_void_p(None))
        code = getattr(self._library, f"paralign_{function}")(*converted, last)
        if code:
            called = "; called with " + ", ".join(describe(x) for x in tensors) if tensors else ""
            raise RuntimeError(f"kernel {function}: {self._library.paralign_error(code).decode()}{called}")


@dataclass(frozen=True)
class Found:
    """The library, or why there is none; `architectures` as it was built, such as sm_90."""

    library: KernelLibrary | None
    architectures: tuple[str, ...]
    reason: str = ""


@functools.cache
def find_library() -> Found:
    """The built library, if this process's CUDA device has launched a kernel of it.

    The first call opens a CUDA context: for who trains. Others ask `built_library`.
    """
    found = built_library()
    if found.library is None:
        return found
    try:
        found.library.call("trial")
    except RuntimeError as error:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
        reason = (
            f"built, but this GPU and its driver refuse them ({error}); run `paralign kernels build --arch "
            f"{architecture}`, with an nvcc that is no newer than the driver's CUDA"
        )
        return Found(None, found.architectures, reason)
    return found


def built_library() -> Found:
    """The built library, if it is there, fits its sources, and there is a CUDA device; nothing is launched."""
    remedy = "run `paralign kernels build`"
    if not LIBRARY.exists():
        return Found(None, (), f"not built; {remedy}")
    architectures = tuple(json.loads(LIBRARY.with_suffix(".json").read_text())["architectures"])
    if not torch.cuda.is_available():
        return Found(None, architectures, "built, but torch finds no CUDA device")
    try:
        library = KernelLibrary(LIBRARY, lambda: torch.cuda.current_stream().cuda_stream)
    except OSError as error:
        return Found(None, architectures, f"built, but cannot be loaded ({error}); {remedy}")
    if library.sources != sources_digest():
        return Found(None, architectures, f"built from other sources; {remedy}")
    return Found(library, architectures)


def library_for(x: Tensor) -> KernelLibrary | None:
    """The kernels that serve this tensor, or None where the reference does."""
    return find_library().library if x.is_cuda else None


def type_code(operation: str, x: Tensor) -> int:
    """The code of a tensor's element type.

    Raises:
        ValueError: the kernels serve float32, float16 and bfloat16 only.
    """
    if x.dtype not in TYPES:
        raise ValueError(f"{operation}: {describe(x)}; kernels serve float32, float16 and bfloat16")
    return TYPES[x.dtype]


def require_served(operation: str, *tensors: Tensor) -> None:
    """Check that kernels can take tensors: their type, or float64 where the definition runs, and their rows' length.

    Rows and offsets are counted in 64 bits, places within a row in 32.

    Raises:
        ValueError: one is of another type, or its rows have 2³¹ elements or more.
    """
    for x in tensors:
        if x.dtype not in TYPES and (x.dtype != torch.float64 or x.is_cuda):
            also = "" if x.is_cuda else ", and on the CPU float64"
            raise ValueError(f"{operation}: {describe(x)}; it takes float32, float16 and bfloat16{also}")
        require(operation, "a row has fewer than 2³¹ elements", max(x.shape[-1:], default=0) < 2**31, x)


def describe(x: Tensor) -> str:
    """A tensor as an error shows it."""
    return f"{x.dtype} of shape {tuple(x.shape)}, stride {x.stride()}".replace("torch.", "")


def require(operation: str, rule: str, holds: bool, *tensors: Tensor) -> None:
    """Check what an operation asks of its inputs.

    Raises:
        ValueError: `rule` does not hold; the message shows the tensors.
    """
    if not holds:
        raise ValueError(f"{operation}: {rule}; got {', '.join(describe(x) for x in tensors)}")
