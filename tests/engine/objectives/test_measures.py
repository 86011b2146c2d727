"""Measures beside a loss: curves of sources that add up to the loss, entropy and accuracy as TRL counts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paralign.engine.batch import Column, PackedBatch, Unit
from paralign.engine.data.loader import NO_SOURCE
from paralign.engine.data.pack import pack_chats
from paralign.engine.objectives.dpo import DPO, DPOConfig
from paralign.engine.objectives.measures import LossBySource, Measured
from paralign.engine.objectives.sft import SFT
from paralign.models.head_read import HeadOutput, Quantity

SAMPLES = [(4, 2), (3, 1), (6, 5)]  # tokens, and how many at the end are learned
SOURCES = [2, 0, 1]


def batch() -> PackedBatch:
    samples = [(np.arange(n), np.arange(n) >= n - learned) for n, learned in SAMPLES]
    pack = pack_chats(samples, 16, torch.device("cpu"))
    n_tail = len(pack.segments.bounds) - len(SAMPLES)
    pack.columns = {Column.SOURCE: torch.tensor(SOURCES + [NO_SOURCE] * n_tail)}
    return pack


def logprobs(pack: PackedBatch) -> torch.Tensor:
    return -torch.arange(1.0, len(pack.loss_rows) + 1)


def given(logprobs_R: torch.Tensor) -> HeadOutput:
    return {Quantity.LOGPROB: logprobs_R}


def test_curves_are_sums_and_counts_of_their_sources():
    objective = Measured(SFT(), [LossBySource(["chat", "code", "chat"])])
    pack = batch()
    found = objective.loss(given(logprobs(pack).requires_grad_()), pack)
    assert objective.metrics == ("loss/chat", "loss/code")
    assert found.metrics.tolist() == [[1 + 2 + 3, 3], [4 + 5 + 6 + 7 + 8, 5]]
    assert not found.metrics.requires_grad
    assert found.totals[Unit.TOKEN].item() == found.metrics[:, 0].sum()
    assert objective.report(found.metrics.tolist()) == {"loss/chat": 2.0, "loss/code": 6.0}


def test_what_was_not_seen_has_no_point_on_its_curve():
    objective = Measured(SFT(), [LossBySource(["chat", "code"])])
    assert objective.report([[6.0, 3.0], [0.0, 0.0]]) == {"loss/chat": 2.0}


def test_a_pack_without_sources_adds_nothing():
    pack = batch()
    pack.columns = {}
    found = Measured(SFT(), [LossBySource(["chat", "code"])]).loss(given(logprobs(pack)), pack)
    assert found.metrics.tolist() == [[0, 0], [0, 0]]
    assert found.totals[Unit.TOKEN] == pytest.approx(36)


def test_the_known_gradient_is_that_of_the_divided_loss():
    pack, counts = batch(), {Unit.TOKEN: 80}
    for objective in (SFT(), Measured(SFT(), [LossBySource(["chat", "code", "chat"])])):
        out = logprobs(pack).requires_grad_()
        (objective.loss(given(out), pack).totals[Unit.TOKEN] / counts[Unit.TOKEN]).backward()
        assert out.grad is not None
        assert out.grad.tolist() == pytest.approx([objective.row_gradient(counts)] * 8)


def test_tokens_count_by_their_weights():
    weights = np.array([0, 0, 0.5, 0.25])
    pack = pack_chats([(np.arange(4), weights), (np.arange(3), 2 * weights[1:])], 16, torch.device("cpu"))
    pack.columns = {Column.SOURCE: torch.tensor([0, 1, NO_SOURCE])}
    out = -torch.tensor([4.0, 8.0, 1.0, 2.0])
    out.requires_grad_()
    objective, counts = Measured(SFT(), [LossBySource(["chat", "code"])]), {Unit.TOKEN: 0.5}
    found = objective.loss(given(out), pack)
    assert found.totals[Unit.TOKEN].item() == 0.5 * 4 + 0.25 * 8 + 1 * 1 + 0.5 * 2
    assert found.metrics.tolist() == [[4.0, 0.75], [2.0, 1.5]]
    (found.totals[Unit.TOKEN] / counts[Unit.TOKEN]).backward()
    known = objective.row_gradient(counts)
    assert known is not None
    assert out.grad is not None
    assert torch.equal(out.grad, known * pack.weights_R)
    assert pack.weights_T.sum() == pack.weights_R.sum() == 2.25


def test_a_loss_that_is_no_such_sum_has_no_known_gradient():
    dpo = DPO(DPOConfig(name="dpo", beta=0.1))
    assert dpo.row_gradient({Unit.PAIR: 1}) is None
    assert Measured(dpo, [LossBySource(["chat"])]).row_gradient({Unit.PAIR: 1}) is None
