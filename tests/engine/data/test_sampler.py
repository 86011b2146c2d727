import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paralign.engine.data.epochs import assign, packs_of_step, step_statistics, steps_per_epoch
from paralign.engine.data.packing import plan_packs


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
    assert (found.samples, found.tokens, found.loss_tokens) == ((2, 0), (20, 0), (8, 0))


@pytest.mark.parametrize("global_batch_size", [5, 8])
def test_statistics_of_a_single_step_are_its_sums(global_batch_size: int):
    lengths = np.array([4, 10, 10, 9, 7])
    plan = plan_packs(lengths, 10, seed=0, epoch=0)
    found = step_statistics(
        plan, lengths, lengths // 2, tokens_per_pack=10, global_batch_size=global_batch_size
    )
    assert (found.packs, found.steps, found.utilisation) == (5, 1, 0.8)
    assert (found.tokens, found.loss_tokens) == ((40, 0), (19, 0))
