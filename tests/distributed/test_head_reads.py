"""What a request asks of the head, over a divided vocabulary and at a layout, is what the whole model says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from paralign.engine.batch import IGNORE, Column, PackedBatch
from paralign.engine.config.model import ModelConfig
from paralign.engine.data.pack import pack_chats
from paralign.engine.kernels.head import read_head
from paralign.engine.kernels.next_token import gumbel, next_token
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.training.model import Model
from paralign.models import arch_from_hf
from paralign.models.head_read import HeadRead, Quantity, Sampling
from paralign.models.heads import ScalarHead

from .pool import RankPool
from .reference import make_samples, tiny_model

OF_ROWS = frozenset(Quantity) - {Quantity.VALUE}
ROWS, TOP = 192, 5


def read_all(
    rank: int, world_size: int, path: Path, keys: dict[str, Any], temperature: float
) -> dict[Quantity, Tensor]:
    """Every quantity of a pack of samples, from the last stage."""
    saved = torch.load(path, weights_only=False)
    arch = arch_from_hf(saved["config"])
    layout = resolve(
        LayoutConfig(**keys), arch, world_size=world_size, global_batch_size=4, tokens_per_pack=ROWS
    )
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        section = ModelConfig(hf=Path(), dtype="fp32")
        model = Model.open(arch, mesh, section, saved["weights"].__getitem__)
        pack = pack_chats(make_samples()[:4], ROWS, mesh.device)
        n_rows = len(pack.loss_rows)
        generator = torch.Generator().manual_seed(2)
        tokens = torch.stack([torch.randperm(arch.vocab_size, generator=generator)[:TOP]] * n_rows)
        pack.columns = {
            Column.REF_TOP_TOKENS: tokens,
            Column.REF_TOP_LOGPROBS: torch.randn(n_rows, TOP, generator=generator),
        }
        sampling = Sampling(torch.arange(n_rows), temperature)
        read: dict[Quantity, Tensor] = {}

        def keep(out: Any, pack: PackedBatch) -> Tensor:
            read.update({quantity: values.clone() for quantity, values in out.items()})
            return pack.tokens_T

        packs = [pack] * layout.micro_batch_multiple
        model.read(packs, lambda pack: pack.read(OF_ROWS, sampling=sampling), keep)
        every: list[Any] = [None] * world_size
        dist.all_gather_object(every, read)
    return next(found for found in every if found)


def test_a_layout_reads_what_one_process_reads(ranks: RankPool, tmp_path: Path) -> None:
    model = tiny_model("qwen2", layers=4)
    path = tmp_path / "model.pt"
    torch.save({"config": model.config.to_dict(), "weights": model.state_dict()}, path)
    degrees = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    alone = ranks.run(1, read_all, path, degrees, 0.7)[0]
    degrees = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    for found in ranks.run(4, read_all, path, degrees, 0.7):
        assert found.keys() == OF_ROWS
        for quantity, values in found.items():
            torch.testing.assert_close(values, alone[quantity], msg=lambda text, q=quantity: f"{q}: {text}")
    assert alone[Quantity.LIKELIEST].dtype == alone[Quantity.SAMPLED].dtype == torch.int64
    assert not torch.equal(alone[Quantity.SAMPLED], alone[Quantity.LIKELIEST])
    cold = ranks.run(
        1, read_all, path, degrees | dict.fromkeys(degrees, 1) | {"sequence_parallel": False}, 1e-4
    )
    assert torch.equal(cold[0][Quantity.SAMPLED], alone[Quantity.LIKELIEST])


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -4.0])
    n = 200_000
    drawn = next_token(
        logits.expand(n, -1), torch.eye(5), vocab_size=5, sampling=Sampling(torch.arange(n), temperature=2.0)
    )
    share = torch.bincount(drawn, minlength=5) / n
    expected = (logits / 2).softmax(-1)
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()  # four deviations


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_no_softmax_has_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        Sampling(torch.arange(1), temperature)


@pytest.mark.parametrize(
    "seeds", [torch.arange(1), torch.arange(5), torch.arange(3.0), torch.ones(3, 1).long()]
)
def test_seeds_that_are_not_one_for_each_row_are_refused(seeds: Tensor) -> None:
    with pytest.raises(ValueError, match=r"next_token: int64 seeds \(R,\), one for each row; got "):
        next_token(torch.zeros(3, 4), torch.zeros(8, 4), vocab_size=8, sampling=Sampling(seeds))


def test_labels_are_not_read_where_nothing_is_about_them() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(8, 4)
    read = HeadRead(frozenset({Quantity.ENTROPY}), torch.arange(3), torch.full((3,), IGNORE))
    found = read_head(hidden, weight, read, vocab_size=8)[Quantity.ENTROPY]
    logprobs = (hidden @ weight.t()).log_softmax(-1)
    torch.testing.assert_close(found, -(logprobs.exp() * logprobs).sum(-1))


def test_noise_is_of_seed_and_token_alone() -> None:
    ids, seeds = torch.arange(1000), torch.tensor([5, 2**62, -1])
    noise = gumbel(seeds, ids)
    assert torch.equal(noise[1:2, 10:20], gumbel(seeds[1:2], ids[10:20]))
    assert noise.isfinite().all()
    means = noise.mean(1)  # 0.5772, deviation π/√6 = 1.28 of each
    assert ((means - 0.5772).abs() < 4 * 1.28 / 1000**0.5).all()
    correlation = torch.corrcoef(gumbel(torch.arange(3), ids))
    assert (correlation - torch.eye(3)).abs().max() < 4 / 1000**0.5


def test_what_the_head_does_not_give_is_an_error() -> None:
    hidden, weight, labels = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2, dtype=torch.int64)
    read = HeadRead(frozenset({Quantity.LOGPROB}), labels, labels)
    for quantity in (Quantity.VALUE, Quantity.SAMPLED, Quantity.DIVERGENCE):
        with pytest.raises(ValueError, match=f"asked for the {quantity.value}; it gives no value"):
            read_head(hidden, weight, replace(read, quantities=frozenset({quantity})), vocab_size=8)
    config = SimpleNamespace(sequence_parallel=False, params_dtype=torch.float32)
    scalar, of_values = (
        ScalarHead(config, 4, tp_group=None),
        replace(read, quantities=frozenset({Quantity.VALUE})),
    )
    assert scalar(hidden[:, None], of_values).keys() == of_values.quantities
    with pytest.raises(
        ValueError, match=r"a scalar head was asked for the log-prob.*; it gives the value alone"
    ):
        scalar(hidden[:, None], read)
