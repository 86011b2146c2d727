"""Tensors of more than 2³¹ elements: offsets are 64-bit. Only the last blocks of a launch run.

Their memory is address space that nobody has touched: it costs what the last rows need.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paralign.engine.kernels import adamw, rms_norm, rope, swiglu, vocab
from paralign.engine.kernels.library import KernelLibrary

HIDDEN = 1022  # no whole packs: offsets are counted in elements, which 32 bits hold least of
ROWS = 2**31 // HIDDEN + 2  # the last row begins past 2³¹
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python names from 3.13 on


def last_blocks(library: KernelLibrary, count: int) -> None:
    ctypes.CDLL(str(library.path)).on_cpu_last_blocks(ctypes.c_uint(count))


@pytest.fixture
def library(cpu_library: KernelLibrary) -> Iterator[KernelLibrary]:
    """The kernels, of whose blocks only the last two run."""
    last_blocks(cpu_library, 2)
    yield cpu_library
    last_blocks(cpu_library, 2**32 - 1)


def reserve(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros that take no memory until they are written."""
    n_bytes = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    space = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(space, dtype=dtype).view(shape)


def filled(*shape: int, seed: int = 0) -> Tensor:
    """Reserved rows, of which the last two hold something."""
    x = reserve(*shape)
    x[-2:] = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    return x


def assert_last_rows(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual[-2:], expected, rtol=2**-7, atol=2**-7)


def test_rms_norm(library: KernelLibrary) -> None:
    x, dy, weight = filled(ROWS, HIDDEN), filled(ROWS, HIDDEN, seed=1), torch.rand(HIDDEN).bfloat16()
    normed, total, rstd = rms_norm.launch_forward(library, x, dy, weight, 1e-5)
    expected, expected_total = rms_norm.add_rms_norm_ref(x[-2:], dy[-2:], weight, 1e-5)
    assert_last_rows(normed, expected)
    assert_last_rows(total, expected_total)
    dx, partial = reserve(ROWS, HIDDEN), reserve(ROWS, HIDDEN, dtype=torch.float32)
    library.call(
        "rms_norm_backward", x, weight, dy, None, rstd, dx, partial, ROWS, HIDDEN, ROWS, 2
    )  # a block for each row, so that the rows of partial sums reach as far
    wanted, dweight = rms_norm._backward(x[-2:], weight, rstd[-2:], dy[-2:], None)
    assert_last_rows(dx, wanted)
    torch.testing.assert_close(partial[-2:].sum(0), dweight.float(), rtol=2**-7, atol=2**-7)


def test_swiglu(library: KernelLibrary) -> None:
    gate_up, dout = filled(ROWS, HIDDEN), filled(ROWS, HIDDEN // 2, seed=1)
    assert_last_rows(swiglu.launch_forward(library, gate_up), swiglu.swiglu_ref(gate_up[-2:]))
    wanted = swiglu._backward(gate_up[-2:], dout[-2:])
    assert_last_rows(swiglu.launch_backward(library, gate_up, dout), wanted)


def test_rope(library: KernelLibrary) -> None:
    q, k = filled(ROWS, 7, HIDDEN // 7), filled(ROWS, 1, HIDDEN // 7, seed=1)
    positions, frequencies = torch.arange(ROWS) % 100, torch.rand(HIDDEN // 14)
    actual = rope.launch(library, q, k, positions, frequencies, 1.0)
    wanted = rope.rope_ref(q[-2:], k[-2:], positions[-2:], frequencies)
    for x, y in zip(actual, wanted, strict=True):
        assert_last_rows(x, y)


def test_vocabulary(library: KernelLibrary) -> None:
    logits = filled(ROWS, HIDDEN)
    labels, chosen = torch.arange(ROWS) % HIDDEN, torch.zeros(ROWS, 0, dtype=torch.int64)
    partials = vocab.launch_partials(library, logits, labels, chosen, chosen.float(), 0)
    wanted = vocab.vocab_partials(logits[-2:], labels[-2:], chosen[-2:], chosen[-2:].float(), 0)
    torch.testing.assert_close(partials[-2:], wanted, rtol=1e-5, atol=1e-5)
    values, gradient = torch.rand(ROWS, vocab.COLUMNS), logits[-2:].clone()
    values[:, 0] += 8
    vocab.vocab_gradient_(gradient, labels[-2:], values[-2:], chosen[-2:], chosen[-2:].float(), 0)
    vocab.launch_gradient(library, logits, labels, values, chosen, chosen.float(), 0)
    assert_last_rows(logits, gradient)


@pytest.mark.parametrize("shift", [0, 1], ids=["packs", "misaligned"])
def test_adamw_and_the_squared_sum(library: KernelLibrary, shift: int) -> None:
    """2²⁰ blocks pass over the buffers several times; the last one meets their end."""
    count, blocks, part = 3 * 2**30, 2**20, slice(-256, None)
    buffers = [reserve(count + shift, dtype=torch.float32)[shift:] for _ in range(4)]
    low, factor = reserve(count + shift)[shift:], torch.tensor(0.5)
    for x in buffers:
        x[part] = torch.rand(256)
    ends = [x[part].clone() for x in (*buffers, low)]
    partial = torch.zeros(blocks)
    library.call("squared_sum", buffers[1], partial, count, blocks)
    torch.testing.assert_close(partial.sum(), ends[1].square().sum())
    numbers = (1e-2, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.01)
    adamw.launch(library, *buffers, low, factor, *numbers)
    adamw._adamw(*ends, factor, *numbers)
    for actual, wanted in zip((*buffers, low), ends, strict=True):
        torch.testing.assert_close(actual[part], wanted)


COUNTED = "int64_t row = ", "int row = "
PLANTED = """
import sys
from pathlib import Path
import tests.csrc.test_large as large
from paralign.engine.kernels.library import KernelLibrary
library = KernelLibrary(Path(sys.argv[2]), lambda: 0)
large.last_blocks(library, 2)
getattr(large, sys.argv[1])(library)
print("not seen")
"""


@pytest.mark.parametrize(
    ("kernel", "test", "old", "new"),
    [
        ("rmsnorm.cu", "test_rms_norm", *COUNTED),
        ("swiglu.cu", "test_swiglu", *COUNTED),
        ("rope.cu", "test_rope", *COUNTED),
        ("vocab.cu", "test_vocabulary", "logits + row * columns", "logits + int(row * columns)"),
    ],
)
def test_an_offset_of_32_bits_is_seen(
    kernel: str, test: str, old: str, new: str, planted: Callable[..., Path]
) -> None:
    path = planted(kernel, kernel, old, new, types="2")
    ended = subprocess.run(
        [sys.executable, "-c", PLANTED, test, str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == -signal.SIGSEGV or "AssertionError" in ended.stderr, ended.stderr[-2000:]
    assert not ended.stdout
