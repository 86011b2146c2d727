"""Training state through megatron-core's sharded checkpoints: any layout saves, any layout loads, if it is to.

It appears whole or not at all; where checkpoints lie stands in store.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from paralign.models.arch import Arch
from paralign.models.errors import CheckpointError, ParalignError
from paralign.models.mcore import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    dist_checkpointing,
    read_through,
)

from ..checkpoint import store
from ..checkpoint.config import CheckpointConfig
from ..checkpoint.dcpfile import StateReader
from ..checkpoint.file_manifest import digest_directory, write_file_manifest
from ..checkpoint.hf import Assets, arch_of, copy_assets
from ..checkpoint.unpickle import refuse_more_than_tensors, weights_only
from .buckets import buckets_of, refuse_other_buckets
from .model import Model
from .optim import Optimizer
from .saving import Save

RECIPE = "recipe.yaml"
ASSETS = "hf"


class NativeCheckpoints:
    """Saves and loads the training state of one run.

    A checkpoint holds the model under the names of the weight rules, the optimizer, the resolved recipe, the
    progress, and in `hf/` the config and tokenizer that turn it into a Hugging Face directory.

    Args:
        root: directory of the run's checkpoints.
        assets: config and tokenizer that belong to the model.
        recipe: the resolved recipe, as text.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        model: Model,
        optimizer: Optimizer,
        *,
        assets: Assets,
        recipe: str,
    ) -> None:
        self.root = root
        self._config = config
        self._mesh = model.mesh
        self._model = model
        self._optimizer = optimizer
        self._assets = assets
        self._recipe = recipe
        self._pending: tuple[Path, Save] | None = None
        self._saved_at = time.monotonic()

    @property
    def saves(self) -> bool:
        """Whether the recipe wants any state saved."""
        return bool(self._config.save_every_steps or self._config.save_every_minutes)

    def due(self, done: int) -> bool:
        """Whether the recipe wants the state saved after `done` steps. Collective where minutes decide."""
        steps, minutes = self._config.save_every_steps, self._config.save_every_minutes
        if steps and done % steps == 0:
            return True
        return bool(minutes and self._mesh.largest(time.monotonic() - self._saved_at >= 60 * minutes))

    def save(self, progress: store.Progress, moved: Callable[[], None], *, last: bool = False) -> None:
        """Write the state after `progress.step` steps; with `async_save` a child of each rank does the writing.

        Collective over all ranks.

        Args:
            moved: called while the writing comes further and is waited for.
            last: the run may not go on at this layout; whatever the recipe says, any will do.

        Raises:
            CheckpointError: it cannot be written, as on a full disk; older checkpoints stay as they are.
        """
        self.finish()
        self._saved_at = time.monotonic()
        directory = store.directory_of(self.root, progress.step)
        same = self._config.layout == "same" and not last
        progress = replace(progress, manifest=True, buckets=buckets_of(self._model) if same else {})
        with self._naming(directory):
            self._pending = directory, self._begin(directory, progress, moved)
        if not self._config.async_save:
            self.finish()

    def _begin(self, directory: Path, progress: store.Progress, moved: Callable[[], None]) -> Save:
        partial = store.unfinished(directory)
        if self._mesh.is_main:
            store.sweep(self.root)
            partial.mkdir(parents=True)
            (partial / RECIPE).write_text(self._recipe, encoding="utf-8")
            store.write_progress(partial, progress)
            dtype = str(self._model.config.params_dtype).removeprefix("torch.")
            copy_assets(self._assets, partial / ASSETS, dtype=dtype)
        self._mesh.barrier()
        self._model.synchronize()
        request = dist_checkpointing.save(
            self._state(is_loading=False, same=bool(progress.buckets)),
            str(partial),
            FullyParallelSaveStrategyWrapper(
                TorchDistSaveShardedStrategy("torch_dist", 1), self._mesh.dp.group
            ),
            async_sharded_save=True,
        )
        return Save(request, self._mesh, in_child=self._config.async_save, moved=moved)

    def poll(self) -> None:
        """Publish a background save that every rank has finished; cheap where there is none. Collective."""
        self._complete(wait=False)

    def finish(self) -> None:
        """Wait for a background save, and publish it. Collective."""
        self._complete(wait=True)

    def _complete(self, *, wait: bool) -> None:
        if self._pending is None:
            return
        directory, save = self._pending
        with self._naming(directory):
            digests = save.completed(wait=wait)
            if digests is None:
                return
            self._pending = None
            if self._mesh.is_main:
                partial = store.unfinished(directory)
                small = digest_directory(partial, without=digests)  # what rank 0 has written itself
                write_file_manifest(partial, {**small, **digests})
                store.publish(directory)
                store.rotate(self.root, self._config)
            self._mesh.barrier()

    @contextmanager
    def _naming(self, what: Path) -> Iterator[None]:
        try:
            yield
        except (Exception, CheckpointException) as error:  # torch's is a BaseException, and seldom says why
            self._pending = None
            newest = store.latest(self.root)
            published = newest == what and not store.unfinished(what).exists()
            disk = next(path for path in (self.root, *self.root.absolute().parents) if path.is_dir())
            free = f"{shutil.disk_usage(disk).free / 1e9:.3f} GB are free there"
            why = error if isinstance(error, ParalignError | OSError) else repr(error)
            if published:
                text = f"{what}: is complete and stays, but what follows a save failed ({why}), {free}"
            else:
                kept = f"{newest} is complete and stays" if newest else "there is none before it"
                text = f"{what}: could not be written ({why}), {free}; {kept}"
            raise CheckpointError(f"{text}; mend that and start the run again") from error

    def load(self, directory: Path) -> store.Progress:
        """Fill model and optimizer from a checkpoint, whatever layout wrote it. Collective.

        Raises:
            CheckpointError: it is of another model or a later megatron-core, or holds more than tensors; or it goes
                on at one layout only, and this is another.
        """
        saved = arch_of(directory / ASSETS)
        if differing := _differences(saved, self._model.arch):
            raise CheckpointError(
                f"{directory}: a checkpoint of another model: {differing}; choose another run_dir"
            )
        progress = self._mesh.from_main(lambda: store.read_progress(directory))
        if progress.buckets:
            refuse_other_buckets(directory, RECIPE, progress.buckets, buckets_of(self._model))
        reader = StateReader(directory)
        refuse_more_than_tensors(reader)
        wanted = self._state(is_loading=True, same=bool(progress.buckets))
        # In fp32 the optimizer's weights are the model's: those that were saved in bf16 must not go over them.
        in_fp32 = self._model.config.params_dtype == torch.float32
        modules = {} if in_fp32 else dict(self._keyed_modules())
        wanted = {key: part for key, part in wanted.items() if key in modules or key == "optimizer"}
        with weights_only(), read_through(reader), _what_a_rank_found():
            state = dist_checkpointing.load(
                wanted,
                str(directory),
                FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), self._mesh.dp.group),
            )
        for key, module in modules.items():
            module.load_state_dict(state[key])
        self._optimizer.megatron.load_state_dict(state["optimizer"])
        if in_fp32:
            for chunk in self._model.chunks:
                chunk.start_param_sync(force_sync=True)
        return progress

    def _keyed_modules(self) -> list[tuple[str, Any]]:
        modules = self._model.modules
        return [("model" if len(modules) == 1 else f"model{i}", module) for i, module in enumerate(modules)]

    def _state(self, *, is_loading: bool, same: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "dp_reshardable" if same else "fully_reshardable",
            "dp_cp_group": self._mesh.dp.group,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            # Each layer under its own name, so that convert reads one tensor without its siblings.
            "non_homogeneous_layers": True,
        }
        state: dict[str, Any] = {
            key: module.sharded_state_dict(metadata=metadata) for key, module in self._keyed_modules()
        }
        state["optimizer"] = self._optimizer.megatron.sharded_state_dict(
            state, is_loading=is_loading, metadata=metadata
        )
        return state


@contextmanager
def _what_a_rank_found() -> Iterator[None]:
    """torch tells of an error on any rank by a BaseException with all of them; the first of them is raised."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from None


def _differences(saved: Arch, ours: Arch) -> str:
    """Shape facts in which two models differ; where a dtype was changed on the way is no matter."""
    return ", ".join(
        f"{name} {getattr(saved, name)!r} where the recipe's has {value!r}"
        for name, value in vars(ours).items()
        if name != "dtype" and getattr(saved, name) != value
    )
