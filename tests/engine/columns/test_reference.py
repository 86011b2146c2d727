"""Kept log-probabilities of a reference model: damaged ones are found, whatever byte it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from paralign.engine.columns.reference import DamagedError, MadeBy, read_reference, write_reference
from paralign.models.errors import DataError

MINE = MadeBy("weights", "data", "template")
VALUES = np.array([-1.5, -2.25, 0.0, -1e3])


def test_a_byte_that_is_not_as_it_was_written_is_never_read_as_a_number(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    write_reference(path, MINE, VALUES)
    content = path.read_bytes()
    assert np.array_equal(read_reference(path, MINE), VALUES)
    n_found = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            assert np.array_equal(read_reference(path, MINE), VALUES), at
        except DataError:
            n_found += 1
    assert n_found > len(content) / 2
    for damaged in (content[:-20], content[: len(content) // 2], bytes(len(content)), b""):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"reference.npz: not a file of reference log-probabilities"):
            read_reference(path, MINE)


def test_the_checksum_is_of_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    about = {"weights": "weights", "data": "data", "template": "template"}
    np.savez(path, values=VALUES, made_by=np.array(json.dumps(about)))  # as older versions wrote it
    assert np.array_equal(read_reference(path, MINE), VALUES)
    np.savez(path, values=VALUES, made_by=np.array(json.dumps(about | {"sha256": "0" * 64})))
    with pytest.raises(DamagedError, match="other numbers than were written"):
        read_reference(path, MINE)
