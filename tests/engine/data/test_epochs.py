from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paralign.engine.data.cache import TokenCache, build_or_open
from paralign.engine.data.config import DataConfig
from paralign.engine.data.epochs import (
    Epochs,
    Share,
    assign,
    packing_of,
    packs_of_step,
    step_statistics,
    steps_per_epoch,
    visits,
)
from paralign.engine.data.loader import PackLoader
from paralign.engine.data.packing import MIXED, PLAIN, plan_packs
from paralign.models.errors import DataError

from .conftest import chat


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_a_sample_is_seen_as_often_as_its_weight_says(weights: list[float], n: int, epochs: int, seed: int):
    sources = np.repeat(np.arange(len(weights)), n)
    seen = [visits(sources, weights, seed=seed, epoch=epoch) for epoch in range(epochs)]
    for source, weight in enumerate(weights):
        each = np.array([times[sources == source] for times in seen])
        assert ((each == np.floor(weight)) | (each == np.ceil(weight))).all()
        assert (np.abs(each.sum(0) - epochs * weight) < 1 + 1e-9).all()
        assert (np.abs(each.sum(1) - n * weight) < 1 + 1e-9).all()


def test_half_a_weight_takes_turns_and_the_seed_says_whose():
    sources = np.zeros(100, dtype=np.int64)
    first, second, third = (visits(sources, [0.5], seed=1, epoch=epoch) for epoch in range(3))
    assert (first + second == 1).all()
    assert np.array_equal(first, third)
    assert not np.array_equal(first, visits(sources, [0.5], seed=2, epoch=0))
    both = visits(np.repeat([0, 1], 100), [0.5, 0.5], seed=1, epoch=0)
    assert not np.array_equal(both[:100], both[100:])


@pytest.fixture
def make_cache(
    tokenizer_dir: Path, write_jsonl: Callable[..., Path], data_config: Callable[..., DataConfig]
) -> Callable[..., TokenCache]:
    def make(*weights: float, n: int = 20) -> TokenCache:
        sources = [
            {"path": write_jsonl(f"{i}.jsonl", [chat("hello", "fine. " * (k % 5 + i + 1)) for k in range(n)])}
            | {"weight": weight}
            for i, weight in enumerate(weights)
        ]
        config = data_config(Path(), train=sources)
        return build_or_open(config, config.train, tokenizer_dir, progress=False)

    return make


def test_the_packs_of_an_epoch_hold_each_sample_as_often_as_it_is_seen(make_cache: Callable[..., TokenCache]):
    cache = make_cache(2, 0.5)
    epochs = Epochs(cache, global_batch_size=4, seed=1)
    for epoch in (0, 1):
        plan = epochs.plan(epoch)
        seen = np.bincount(plan.sample_ids, minlength=len(cache))
        assert (seen[cache.sources == 0] == 2).all()
        assert seen[cache.sources == 1].sum() == 10
        assert all(cache.lengths[plan.pack(i)].sum() <= 64 for i in range(len(plan)))


@pytest.mark.parametrize("weights", [(1, 2), (0.3, 1), (0.1, 0)])
def test_steps_are_numbered_through_all_epochs(
    make_cache: Callable[..., TokenCache], weights: tuple[float, ...]
):
    cache = make_cache(*weights)
    epochs = Epochs(cache, global_batch_size=2, seed=1)
    expected = [(epoch, index) for epoch in range(5) for index in range(-(-len(epochs.plan(epoch)) // 2))]
    assert [epochs.locate(step) for step in range(len(expected))] == expected
    assert epochs.first_step(5) == len(expected)
    again = Epochs(cache, global_batch_size=2, seed=1)
    assert again.locate(len(expected) - 1) == expected[-1]  # asked for alone, as a resumed run does
    assert np.array_equal(again.plan(3).sample_ids, epochs.plan(3).sample_ids)


def test_a_run_goes_on_with_the_packing_that_it_was_saved_with(make_cache: Callable[..., TokenCache]):
    cache = make_cache(1, 2)

    def loader(**packing: int) -> PackLoader:
        share = Share(0, 1, 1)
        return PackLoader(
            cache, global_batch_size=2, seed=1, share=share, device=torch.device("cpu"), **packing
        )

    old, new = f"{cache.fingerprint}/2/1", loader().fingerprint
    assert packing_of(old) == PLAIN
    assert packing_of(new) == MIXED
    assert loader(packing=packing_of(old)).fingerprint == old != new
    once = make_cache(1)
    plain = plan_packs(once.lengths, 64, seed=1, epoch=0, version=PLAIN)
    for packing, same in ((PLAIN, True), (MIXED, False)):
        plan = Epochs(once, global_batch_size=2, seed=1, packing=packing).plan(0)
        assert np.array_equal(plan.sample_ids, plain.sample_ids) == same


def test_weights_that_leave_an_epoch_empty_are_an_error(make_cache: Callable[..., TokenCache]):
    with pytest.raises(DataError, match=r"data.train: with weights \[0.001\] epoch 0 holds no sample"):
        Epochs(make_cache(0.001, n=3), global_batch_size=2, seed=1).first_step(1)


def test_weights_change_what_a_checkpoint_goes_on_with(make_cache: Callable[..., TokenCache]):
    one, two = make_cache(1, 1), make_cache(1, 2)
    assert one.directory == two.directory
    assert one.fingerprint != two.fingerprint


@given(st.integers(1, 50), st.integers(1, 12))
def test_the_steps_of_an_epoch_take_every_pack_once(n_packs: int, global_batch_size: int):
    steps = range(steps_per_epoch(n_packs, global_batch_size))
    taken = [pack for index in steps for pack in packs_of_step(n_packs, global_batch_size, index)]
    assert taken == list(range(n_packs))


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 4), st.integers(1, 3))
def test_ranks_have_as_many_micro_batches_and_share_the_packs(work: list[int], dp_size: int, multiple: int):
    ranks = assign(work, dp_size, multiple)
    assert len(ranks) == dp_size
    assert {len(packs) for packs in ranks} == {-(-len(work) // (dp_size * multiple)) * multiple}
    assert sorted(i for packs in ranks for i in packs if i is not None) == list(range(len(work)))


def test_work_is_balanced_across_ranks():
    work = np.random.default_rng(0).lognormal(0, 1, 64).tolist()
    loads = [sum(work[i] for i in packs if i is not None) for packs in assign(work, 8, 1)]
    in_order = [sum(work[i::8]) for i in range(8)]
    assert max(loads) / min(loads) < 1.1 < max(in_order) / min(in_order)


def test_statistics_are_those_of_full_steps():
    lengths = np.array([10] * 5)
    n_loss = np.array([4] * 5)
    plan = plan_packs(lengths, 10, seed=0, epoch=0)
    found = step_statistics(plan, lengths, n_loss, tokens_per_pack=10, global_batch_size=2)
    assert (found.packs, found.steps, found.utilisation) == (5, 3, 1.0)
    assert (found.samples, found.loss_tokens) == ((2, 0), (8, 0))


@pytest.mark.parametrize("global_batch_size", [5, 8])
def test_statistics_of_a_single_step_are_its_sums(global_batch_size: int):
    lengths = np.array([4, 10, 10, 9, 7])
    plan = plan_packs(lengths, 10, seed=0, epoch=0)
    found = step_statistics(
        plan, lengths, lengths // 2, tokens_per_pack=10, global_batch_size=global_batch_size
    )
    assert (found.packs, found.steps, found.utilisation) == (5, 1, 0.8)
    assert found.loss_tokens == (19, 0)
