"""What each rank holds and moves of a training state at TP2×DP2, counted, and as `state_bytes` has it."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paralign.engine.checkpoint import dcpfile, store
from paralign.engine.checkpoint.state_bytes import OPTIMIZER, state_bytes
from paralign.engine.checkpoint.unpickle import read_metadata
from paralign.engine.processes.stop import Stop
from paralign.engine.run.check import check
from paralign.engine.run.recipe import load

from .pool import RankPool
from .toy import make_toy, write_recipe

WEIGHT = 2  # bytes, in bf16
AT_ONCE = (
    4096  # bytes of a tensor in memory while it is read; as small beside the toy as 16 MiB beside a model
)


class HostMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it; `most` is how many were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            address, n_bytes = storage.data_ptr(), storage.nbytes()
            if address not in given | self._alive:
                self._alive.add(address)
                self._now += n_bytes
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._ended, address, n_bytes)
        return made

    def _ended(self, address: int, n_bytes: int) -> None:
        self._alive.discard(address)
        self._now -= n_bytes


def _storages(tree: Any) -> list[Any]:
    leaves = [leaf for leaf in tree_leaves(tree) if type(leaf) in (torch.Tensor, torch.nn.Parameter)]
    return [leaf.untyped_storage() for leaf in leaves if leaf.device.type == "cpu"]


class Counts(NamedTuple):
    """Bytes of one rank at a load, the parameters that it holds, and collections of garbage on the way."""

    parameters: int
    read: int
    received: int
    most: int
    collections: int


def save_and_load(rank: int, world_size: int, recipe: Path, layout: str) -> Counts:
    from paralign.engine.parallel.mesh import open_mesh
    from paralign.engine.run.assemble import build_trainer
    from paralign.engine.training import state

    readers: list[dcpfile.StateReader] = []
    received, collections = [0], [0]

    class Counted(dcpfile.StateReader):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            readers.append(self)

    def broadcast(tensor: torch.Tensor, src: int, *args: Any, **options: Any) -> Any:
        received[0] += tensor.nbytes * (src != rank)
        return plain(tensor, src, *args, **options)

    def collect(*arguments: Any) -> int:
        collections[0] += 1
        return 0

    plain = dist.broadcast
    report = check(load(recipe), world_size)
    with open_mesh(report.layout, local_rank=rank, seed=1) as mesh, pytest.MonkeyPatch.context() as patched:
        trainer = build_trainer(report, mesh, Stop())
        directory = store.directory_of(trainer.checkpoints.root, 1)
        patched.setattr(gc, "collect", collect)
        trainer.checkpoints.save(store.Progress(1, ""), lambda: None, last=layout == "any")
        patched.setattr(dcpfile, "AT_ONCE", AT_ONCE)
        patched.setattr(state, "StateReader", Counted)
        patched.setattr(
            "megatron.core.dist_checkpointing.exchange_utils.torch.distributed.broadcast", broadcast
        )
        with HostMemory() as memory:
            trainer.checkpoints.load(directory)
        parameters = sum(weight.numel() for _, weight in trainer.learner.model.named_weights())
        return Counts(parameters, readers[-1].n_bytes, received[0], memory.most, collections[0])


@pytest.mark.parametrize("layout", ["any", "same"])
def test_bytes_of_each_rank(tmp_path: Path, layout: str, ranks: RankPool) -> None:
    make_toy(tmp_path, n_chats=20)
    tp2 = {"tensor_model_parallel_size": 2}
    recipe = write_recipe(tmp_path, "run", tp2, model__dtype="bf16", checkpoint__layout="same")
    found = ranks.run(4, save_and_load, recipe, layout)

    metadata = read_metadata(tmp_path / "run/checkpoints/iter_0000001")
    written = Counter[int]()
    for index, place in metadata.storage_data.items():
        stored = metadata.state_dict_metadata[index.fqn]
        for chunk in getattr(stored, "chunks", ()):
            if chunk.offsets == index.offset:
                rank = int(place.relative_path.split("_")[2])
                written[rank] += chunk.sizes.numel() * stored.properties.dtype.itemsize
    whole = sum(
        stored.size.numel() * stored.properties.dtype.itemsize
        for stored in metadata.state_dict_metadata.values()
        if hasattr(stored, "size")
    )
    assert sum(written.values()) == whole  # each byte by one rank

    for rank, counts in enumerate(found):
        expected = state_bytes(counts.parameters, dp=2, weight=WEIGHT)
        # By the tensor: the halves of weights differ by a tensor, and norms are written by the first of tp 2.
        assert written[rank] == pytest.approx(expected.disk, rel=0.05)
        assert counts.read == pytest.approx(expected.disk, rel=0.05)
        assert counts.received == pytest.approx(expected.received, rel=0.2)
        # On the host a received weight is a copy, and gate and up are joined in another; on a device nothing is.
        assert not counts.collections  # each takes as long as all else that a save blocks for
        assert counts.most < 2 * WEIGHT * counts.parameters + 2 * AT_ONCE < OPTIMIZER * counts.parameters / 2
    for tp in range(2):  # the ranks of a data-parallel group, among them
        group = [found[tp], found[tp + 2]]
        assert sum(counts.read for counts in group) == (OPTIMIZER + WEIGHT) * group[0].parameters
        assert sum(counts.received for counts in group) == WEIGHT * group[0].parameters
