"""The optimizer under Megatron's: torch's AdamW in one pass, its state torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from paralign.engine.training.optim import FusedAdamW, _allocate_state

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIZES = (37, 1, 64)


def make(kind: type[torch.optim.AdamW]) -> tuple[list[torch.nn.Parameter], Any]:
    """Parameters of two groups, the last without decay, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer: Any = kind(groups, **SETTINGS)
    _allocate_state(optimizer, offloaded=0.0)
    if isinstance(optimizer, FusedAdamW):
        optimizer.factor = torch.tensor(0.25)
        optimizer.model_shards = {parameters[0]: torch.zeros(37, dtype=torch.bfloat16)}
    return parameters, optimizer


def step(parameters: list[torch.nn.Parameter], optimizer: Any, number: int) -> None:
    scale = 1.0 if isinstance(optimizer, FusedAdamW) else 0.25
    for i, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(10 * number + i)
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    optimizer.step()


@pytest.mark.parametrize(("offloaded", "places"), [(0.0, "mmm"), (0.3, "cmm"), (0.5, "ccm"), (1.0, "ccc")])
def test_the_first_moments_go_to_the_host(offloaded: float, places: str) -> None:
    """A device that is not the host's, and has no arithmetic, will do."""
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in (40, 20, 40)]
    optimizer = torch.optim.AdamW(parameters, **SETTINGS)
    _allocate_state(optimizer, offloaded)
    for name in ("exp_avg", "exp_avg_sq"):
        assert "".join(optimizer.state[p][name].device.type[0] for p in parameters) == places
        assert all(optimizer.state[p][name].shape == p.shape for p in parameters)


def test_moments_stay_where_they_are_when_state_is_loaded() -> None:
    """torch would take them to the parameter's device."""
    parameters, optimizer = make(FusedAdamW)
    step(parameters, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    homes = [optimizer.state[p]["exp_avg"] for p in parameters]
    step(parameters, optimizer, 1)
    optimizer.load_state_dict(saved)
    for i, (parameter, home) in enumerate(zip(parameters, homes)):
        assert optimizer.state[parameter]["exp_avg"] is home
        assert torch.equal(home, saved["state"][i]["exp_avg"])


def test_moments_that_are_loaded_do_not_pass_through_the_device() -> None:
    """It may have no room for all of them: that is why they lie on the host. A device without bytes will do."""
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = FusedAdamW([parameter], **SETTINGS)
    _allocate_state(optimizer, offloaded=1.0)
    optimizer.state[parameter]["exp_avg"].fill_(2.0)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[parameter]["exp_avg"].tolist() == [2.0] * 3


def test_updates_and_state_are_torchs_to_rounding() -> None:
    (ours, fused), (theirs, plain) = make(FusedAdamW), make(torch.optim.AdamW)
    for number in range(4):
        step(ours, fused, number)
        step(theirs, plain, number)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for parameter, other in zip(ours, theirs, strict=True):
        assert fused.state[parameter].keys() == plain.state[other].keys()
        for name, value in fused.state[parameter].items():
            torch.testing.assert_close(value, plain.state[other][name], rtol=1e-6, atol=1e-8)
    assert torch.equal(fused.model_shards[ours[0]], ours[0].detach().bfloat16())
    assert fused.param_groups[0].keys() == plain.param_groups[0].keys()


def test_either_goes_on_from_the_others_state() -> None:
    (ours, fused), (theirs, plain) = make(FusedAdamW), make(torch.optim.AdamW)
    for number in range(2):
        step(ours, fused, number)
        step(theirs, plain, number)
    before = copy.deepcopy(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(before)
    step(ours, fused, 2)
    step(theirs, plain, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
