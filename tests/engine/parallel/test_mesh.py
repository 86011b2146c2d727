"""Process groups: how many, in which order, and what they are told of the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from paralign.engine.parallel import mesh as module
from paralign.engine.parallel.mesh import Mesh, local_device, open_world
from paralign.models.mcore import initialize_model_parallel, parallel_state


def _groups_made_by(
    rank: int, world_size: int, tp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """Backend and ranks of each, in order, as this rank makes them where the world is on NCCL."""
    made: list[Any] = []
    theirs = dist.new_group

    def new_group(ranks: list[int], backend: str | None = None, **options: Any) -> Any:
        made.append((backend or "nccl", tuple(sorted(ranks))))
        return theirs(ranks, backend="fake", group_desc=options["group_desc"])

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    with monkeypatch.context() as patched:
        patched.setattr(dist, "new_group", new_group)
        try:
            initialize_model_parallel(tp, pp)
            assert parallel_state.get_data_parallel_group().size() == world_size // (tp * pp)
            assert parallel_state.get_tensor_model_parallel_group().size() == tp
            assert parallel_state.get_pipeline_model_parallel_group().size() == pp
            gloo = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
            assert gloo is not parallel_state.get_data_parallel_group()
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return made


@pytest.mark.parametrize(
    ("tp", "pp", "dp"), [(1, 1, 8), (2, 1, 2), (1, 2, 2), (2, 2, 2), (4, 4, 2), (8, 4, 2), (8, 2, 4)]
)
def test_every_rank_makes_the_same_few_groups_in_one_order(
    tp: int, pp: int, dp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world_size = tp * pp * dp
    along_axes = world_size // tp + world_size // pp + 2 * world_size // dp  # gloo's along dp too, for saving
    others = (
        world_size + world_size // pp + dp + pp + 1
    )  # each rank; first and last stages; copies; stages; all
    first = _groups_made_by(0, world_size, tp, pp, monkeypatch)
    assert len(set(first)) == len(first) <= along_axes + others
    for rank in {1, tp, world_size // 2, world_size - 1}:
        assert _groups_made_by(rank, world_size, tp, pp, monkeypatch) == first


def test_32_ranks_make_95_groups_where_megatron_makes_229(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _groups_made_by(0, 32, 4, 4, monkeypatch)
    assert len(made) == 95
    assert sum(backend == "gloo" for backend, _ in made) == 16


def test_nccl_is_not_bound_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound, every new group would be split from the world's communicator, by all ranks on the GPU."""
    told: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(
        dist, "init_process_group", lambda *backend, **options: told.append((*backend, options))
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with open_world(rank=3, world_size=8, local_rank=3, timeout_minutes=1, store=FakeStore()):
        device, (backend, options) = told
    assert device == torch.device("cuda", 3)
    assert backend == "nccl"
    assert options.get("device_id") is None


def test_a_barrier_names_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(module.dist, "barrier", lambda **options: told.append(options))
    layout: Any = SimpleNamespace()
    for device in ("cuda:3", "cpu"):
        Mesh(layout, 3, 8, torch.device(device), {}).barrier()
    assert told == [{"device_ids": [3]}, {"device_ids": None}]


@pytest.mark.parametrize(("count", "expected"), [(0, "cpu"), (1, "cuda:0"), (8, "cuda:3")])
def test_a_rank_takes_its_gpu_or_the_only_one_it_is_shown(
    count: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert local_device(3) == torch.device(expected)
