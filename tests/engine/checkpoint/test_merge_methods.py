"""Each method against its formula, written out in fp64 on whole tensors."""

import math

import pytest
import torch

from paralign.engine.checkpoint import merge_methods as methods

SHAPES = [(7,), (40, 33), (1100, 1000)]  # the last spans several blocks


@pytest.fixture(params=SHAPES, ids=str)
def models(request):
    """A base and three models near it, fp32."""
    torch.manual_seed(0)
    base = torch.randn(request.param)
    return base, [base + 0.3 * torch.randn(request.param) for _ in range(3)]


WEIGHTS = [0.5, 0.9, -0.2]


def close(found, expected):
    found = whole(found, expected)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def whole(found, like):
    """The blocks that a method yields, as one tensor; each is copied before the next is asked for."""
    return torch.cat([block.clone() for block in found]).view(like.shape)


def doubled(base, tensors):
    return base.double(), torch.stack([tensor.double() for tensor in tensors])


def weights_like(tensor):
    return torch.tensor(WEIGHTS, dtype=torch.float64).view(-1, *[1] * tensor.dim())


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(models, normalize):
    base, tensors = models
    _, stacked = doubled(base, tensors)
    expected = (weights_like(base) * stacked).sum(0) / (sum(WEIGHTS) if normalize else 1)
    close(methods.linear(tensors, WEIGHTS, normalize=normalize, out=torch.float32), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(models, normalize):
    base, tensors = models
    base64, stacked = doubled(base, tensors)
    task = (weights_like(base) * (stacked - base64)).sum(0) / (sum(WEIGHTS) if normalize else 1)
    merged = methods.task_arithmetic(
        base, tensors, WEIGHTS, scale=0.7, normalize=normalize, out=torch.float32
    )
    close(merged, base64 + 0.7 * task)


def elected(deltas, weights, normalize):
    weighted = deltas * weights
    sign = torch.where(weighted.sum(0) >= 0, 1, -1)
    agrees = weighted.sign() == sign
    total = (weighted * agrees).sum(0)
    divisor = (weights * agrees).sum(0)
    return total / torch.where(divisor == 0, 1, divisor) if normalize else total


@pytest.mark.parametrize("normalize", [True, False])
def test_ties(models, normalize):
    base, tensors = models
    base64 = base.double()
    deltas = (torch.stack(tensors) - base).double()
    densities = [0.5, 0.25, 1.0]
    for delta, density in zip(deltas, densities):
        kept = max(1, int(density * delta.numel()))
        floor = delta.abs().flatten().sort(descending=True).values[kept - 1]
        delta[delta.abs() < floor] = 0
    expected = base64 + 0.5 * elected(deltas, weights_like(base), normalize)
    merged = methods.ties(
        base, tensors, WEIGHTS, densities=densities, scale=0.5, normalize=normalize, out=torch.float32
    )
    close(merged, expected)


def test_dare_ties_keeps_all_at_density_one_and_the_mean_below(models):
    base, tensors = models
    base64, stacked = doubled(base, tensors)
    common = {"scale": 1.0, "normalize": False, "out": torch.float32, "seeds": [1, 2, 3]}
    merged = methods.dare_ties(base, tensors, WEIGHTS, densities=[1.0] * 3, **common)
    close(merged, base64 + elected(stacked - base64, weights_like(base), normalize=False))
    if base.numel() > 10000:
        alone = {**common, "seeds": [1]}
        dropped = methods.dare_ties(base, tensors[:1], [1.0], densities=[0.25], **alone)
        dropped = whole(dropped, base) - base
        delta = tensors[0] - base
        kept = dropped != 0
        assert kept.double().mean().item() == pytest.approx(0.25, abs=0.01)
        torch.testing.assert_close(dropped[kept], 4 * delta[kept], rtol=1e-3, atol=1e-5)
        again = methods.dare_ties(base, tensors[:1], [1.0], densities=[0.25], **alone)
        assert torch.equal(dropped, whole(again, base) - base)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(models, filter_wise):
    base, tensors = models
    base64, stacked = doubled(base, tensors)
    rows = base64.shape[0] if filter_wise and base.dim() > 1 else 1
    deltas = (stacked - base64).view(3, rows, -1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosine = sum(torch.cosine_similarity(deltas[a], deltas[b], dim=-1) for a, b in pairs) / 3
    ratio = (3 * cosine / (1 + 2 * cosine))[:, None]
    expected = base64.view(rows, -1) + ratio * deltas.mean(0)
    merged = methods.model_stock(base, tensors, filter_wise=filter_wise, out=torch.float32)
    close(merged, expected.view(base.shape))


def test_model_stock_of_models_that_did_not_move_is_the_base():
    base = torch.randn(5)
    merged = methods.model_stock(base, [base.clone(), base.clone()], filter_wise=False, out=torch.float32)
    assert torch.equal(whole(merged, base), base)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(models, t):
    base, _ = models
    far = torch.randn_like(base)
    a, b = base.double(), far.double()
    angle = math.acos((a * b).sum() / (a.norm() * b.norm()))
    expected = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    close(methods.slerp(base, far, t=t, out=torch.float32), expected)
    near = base * 1.5
    close(methods.slerp(base, near, t=t, out=torch.float32), (1 - t) * a + t * near.double())


def test_bf16_models_are_merged_in_fp32():
    torch.manual_seed(0)
    tensors = [torch.randn(1000).bfloat16() for _ in range(3)]
    exact = sum(tensor.double() for tensor in tensors) / 3
    merged = methods.linear(tensors, [1.0, 1.0, 1.0], normalize=True, out=torch.bfloat16)
    found = whole(merged, exact).double()
    torch.testing.assert_close(found, exact, rtol=2**-8 * 1.001, atol=0)  # one rounding, to bf16
