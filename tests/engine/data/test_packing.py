import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paralign.engine.data.packing import PLAIN, PackPlan, plan_packs

ROOM = 40
lengths_lists = st.lists(st.integers(1, ROOM), min_size=1, max_size=80)


def totals(plan: PackPlan, lengths: np.ndarray) -> np.ndarray:
    return np.add.reduceat(lengths[plan.sample_ids], plan.offsets[:-1])


def best_fit_one_by_one(lengths: list[int]) -> list[int]:
    """Room left in each bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(ROOM - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(lengths_lists, st.integers(0, 5), st.integers(0, 5))
def test_every_sample_is_in_one_pack_and_no_pack_overflows(values: list[int], seed: int, epoch: int):
    lengths = np.array(values)
    plan = plan_packs(lengths, ROOM, seed=seed, epoch=epoch)
    assert sorted(plan.sample_ids) == list(range(len(values)))
    assert plan.offsets[-1] == len(values)
    assert (np.diff(plan.offsets) > 0).all()
    assert totals(plan, lengths).max() <= ROOM


@settings(deadline=None, max_examples=200)
@given(lengths_lists)
def test_groups_are_placed_as_best_fit_places_one_by_one(values: list[int]):
    lengths = np.array(values)
    rooms = ROOM - totals(plan_packs(lengths, ROOM, seed=0, epoch=0, version=PLAIN), lengths)
    assert sorted(rooms.tolist()) == best_fit_one_by_one(values)


def test_a_plan_is_a_pure_function_and_epochs_differ_in_order_alone():
    lengths = np.random.default_rng(0).integers(1, 20, size=500)
    plan = plan_packs(lengths, ROOM, seed=3, epoch=1)
    again = plan_packs(lengths.copy(), ROOM, seed=3, epoch=1)
    assert np.array_equal(plan.sample_ids, again.sample_ids)
    assert np.array_equal(plan.offsets, again.offsets)
    for other in (plan_packs(lengths, ROOM, seed=3, epoch=2), plan_packs(lengths, ROOM, seed=4, epoch=1)):
        assert not np.array_equal(plan.sample_ids, other.sample_ids)


def test_samples_of_one_length_meet_others_in_each_epoch():
    lengths = np.full(100, ROOM // 2)
    pairs = [
        {frozenset(plan.pack(i).tolist()) for i in range(len(plan))}
        for plan in (plan_packs(lengths, ROOM, seed=0, epoch=epoch) for epoch in (0, 1))
    ]
    assert len(pairs[0] & pairs[1]) < 10


LENGTHS = {
    "log-normal": lambda draw: np.exp(draw.normal(np.log(350), 1.1, 10_000)),
    "log-normal, few": lambda draw: np.exp(draw.normal(np.log(350), 1.1, 2_000)),
    "log-normal, long": lambda draw: np.exp(draw.normal(np.log(1500), 0.8, 10_000)),
    "uniform": lambda draw: draw.uniform(16, 4096, 10_000),
    "exponential": lambda draw: draw.exponential(600, 10_000),
    "two kinds": lambda draw: np.where(draw.random(10_000) < 0.3, draw.normal(3000, 300, 10_000), 120),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LENGTHS)
def test_samples_that_shared_a_pack_seldom_do_again_and_packs_stay_full(name: str, seed: int):
    lengths = np.clip(LENGTHS[name](np.random.default_rng(seed)), 16, 8192).astype(np.int64)
    plans = [plan_packs(lengths, 8192, seed=seed, epoch=epoch) for epoch in range(3)]
    plain = plan_packs(lengths, 8192, seed=seed, epoch=0, version=PLAIN)
    for plan in plans:
        utilisation = lengths.sum() / (len(plan) * 8192)
        assert utilisation >= 0.99 or len(plan) <= 1.005 * len(plain)
    assert max(share_that_meets_again(*plans[i : i + 2]) for i in range(2)) <= 0.05


def share_that_meets_again(one: PackPlan, other: PackPlan) -> float:
    """Of the pairs of samples that share a pack in one plan, the share that does in the other too."""
    pack_of = np.empty(len(other.sample_ids), dtype=np.int64)
    pack_of[other.sample_ids] = np.repeat(np.arange(len(other)), np.diff(other.offsets))
    pairs = again = 0
    for i in range(len(one)):
        together = np.bincount(pack_of[one.pack(i)] - pack_of[one.pack(i)].min())
        n = len(one.pack(i))
        pairs += n * (n - 1) // 2
        again += int((together * (together - 1) // 2).sum())
    return again / max(1, pairs)


def test_the_order_of_packs_does_not_follow_their_lengths():
    lengths = np.random.default_rng(0).integers(1, ROOM + 1, size=4000)
    plan = plan_packs(lengths, ROOM, seed=0, epoch=0)
    longest = np.maximum.reduceat(lengths[plan.sample_ids], plan.offsets[:-1])
    assert abs(np.corrcoef(longest, np.arange(len(plan)))[0, 1]) < 0.1


def test_the_simulated_mix_fills_more_than_99_percent():
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(350), 1.1, 20_000), 16, 8192).astype(np.int64)
    plan = plan_packs(lengths, 8192, seed=0, epoch=0)
    assert lengths.sum() / (len(plan) * 8192) > 0.99


def test_no_samples_make_no_packs():
    assert len(plan_packs(np.array([], dtype=np.int64), ROOM, seed=0, epoch=0)) == 0


@pytest.mark.parametrize("values", [[0, 3], [3, ROOM + 1]])
def test_a_length_outside_the_pack_is_refused(values: list[int]):
    with pytest.raises(ValueError, match=f"expected 1 to {ROOM}"):
        plan_packs(np.array(values), ROOM, seed=0, epoch=0)
