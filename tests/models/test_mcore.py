"""The door to megatron-core; what it opens to is tested in tests/distributed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paralign.models import mcore
from paralign.models.errors import CheckpointError


class TheirAdam(torch.optim.SGD):
    """Of another package."""


def test_another_optimizer_than_torchs_adamw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = TheirAdam([torch.nn.Parameter(torch.ones(1))])
    made = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=taken)])
    monkeypatch.setattr(mcore.optimizer, "get_megatron_optimizer", lambda *_: made)
    nothing: Any = None
    with pytest.raises(RuntimeError, match=r"megatron-core .* took .*TheirAdam where torch's AdamW is meant"):
        mcore.build_optimizer(mcore.DistributedOptimizer, nothing, nothing)


def test_a_version_that_cannot_load_what_a_later_one_saved_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(mcore.serialization, "_get_filesystem_reader", raising=False)
    reader = SimpleNamespace(path=tmp_path)
    remedy = r"common\.pt: missing; megatron-core 0\.19 and later save without it, .*: install a later one"
    with pytest.raises(CheckpointError, match=remedy), mcore.read_through(reader):
        pass
    (tmp_path / "common.pt").touch()
    with mcore.read_through(reader):
        assert mcore.torch_strategies._get_filesystem_reader("anywhere") is reader
    assert mcore.torch_strategies._get_filesystem_reader(tmp_path) is not reader
