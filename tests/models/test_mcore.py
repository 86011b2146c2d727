"""The door to megatron-core; what it opens to is tested in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paralign.models import mcore


class TheirAdam(torch.optim.SGD):
    """Of another package."""


def test_another_optimizer_than_torchs_adamw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = TheirAdam([torch.nn.Parameter(torch.ones(1))])
    made = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=taken)])
    monkeypatch.setattr(mcore.optimizer, "get_megatron_optimizer", lambda *_: made)
    nothing: Any = None
    with pytest.raises(RuntimeError, match=r"megatron-core .* took .*TheirAdam where torch's AdamW is meant"):
        mcore.build_optimizer(mcore.DistributedOptimizer, nothing, nothing)
