"""Digests that a single bit changes, and whose copy is wrong."""

from __future__ import annotations

import pytest
import torch

from paralign.engine.training.soundness import Copy, digest, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 2048, 5001])
def test_any_bit_changes_the_digest(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16)
    before = digest(tensor).item()
    assert digest(tensor.clone()).item() == before
    for place in {0, size // 2, size - 1}:
        for bit in range(8 * tensor.element_size() - 1):
            bits[place] ^= 1 << bit
            assert digest(tensor).item() != before
            bits[place] ^= 1 << bit
    assert digest(tensor).item() == before


def test_numbers_that_change_places_change_the_digest() -> None:
    tensor = torch.arange(4096.0)
    swapped = tensor.clone()
    swapped[[3, 4]] = tensor[[4, 3]]
    assert digest(tensor).item() != digest(swapped).item()
    assert digest(tensor.view(64, 64)).item() == digest(tensor).item()


def _copies(digests: str, wrong: list[int | None] | None = None) -> list[Copy]:
    return [
        Copy(rank, f"node{rank}", ord(one), found)
        for rank, (one, found) in enumerate(zip(digests, wrong or [None] * len(digests)))
    ]


@pytest.mark.parametrize(
    ("copies", "words"),
    [
        (_copies("ab"), "ranks 0 (node0), 1 (node1) hold copies that differ, and nothing tells which is right"),
        (_copies("aba"), "the copy of rank 1 (node1) is wrong, 2 of 3 are equal"),
        (_copies("abac"), "ranks 0 (node0), 1 (node1), 2 (node2), 3 (node3) hold copies that differ"),
        (_copies("abaac"), "the copy of ranks 1 (node1), 4 (node4) is wrong, 3 of 5 are equal"),
        (_copies("ab", [0, 3]), "the copy of rank 1 (node1) is wrong in 3 numbers, by the optimizer's main weights"),
        (_copies("ab", [5, 0]), "the copy of rank 0 (node0) is wrong in 5 numbers, by the optimizer's main weights"),
        (_copies("ab", [0, 0]), "nothing tells which is right"),  # the main weights differ as well
        (_copies("aab", [0, 0, 0]), "the copy of rank 2 (node2) is wrong, 2 of 3 are equal"),
    ],
)  # fmt: skip
def test_whose_copy_is_wrong(copies: list[Copy], words: str) -> None:
    assert words in verdict(copies)
