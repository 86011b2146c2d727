"""Training state through megatron-core's sharded checkpoints: any layout saves, any layout loads.

It appears whole or not at all; where checkpoints lie stands in store.py.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from paralign.models.arch import Arch
from paralign.models.errors import CheckpointError
from paralign.models.mcore import (
    ON_HOST,
    AsyncCallsQueue,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    dist_checkpointing,
)

from ..checkpoint import store
from ..checkpoint.config import CheckpointConfig
from ..checkpoint.hf import Assets, arch_of, copy_assets
from ..checkpoint.unpickle import MetadataReader, refuse_more_than_tensors, weights_only
from .model import Model
from .optim import Optimizer

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
        self._queue = AsyncCallsQueue(persistent=False)

    def save(self, progress: store.Progress) -> None:
        """Write the state after `progress.step` steps; with `async_save` the writing goes on in the background.

        Collective over all ranks.

        Raises:
            CheckpointError: it cannot be written, as on a full disk; older checkpoints stay as they are.
        """
        self.finish()
        directory = store.directory_of(self.root, progress.step)
        with self._naming(directory):
            self._save(directory, progress)

    def _save(self, directory: Path, progress: store.Progress) -> None:
        partial = store.unfinished(directory)
        if self._mesh.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / RECIPE).write_text(self._recipe, encoding="utf-8")
            store.write_progress(partial, progress)
            dtype = str(self._model.config.params_dtype).removeprefix("torch.")
            copy_assets(self._assets, partial / ASSETS, dtype=dtype)
        self._mesh.barrier()
        self._model.synchronize()
        with _main_stays_out_of_processes():
            request = dist_checkpointing.save(
                self._state(is_loading=False),
                str(partial),
                TorchDistSaveShardedStrategy("torch_dist", 1),
                async_sharded_save=self._config.async_save,
            )
        if request is None:
            self._publish(directory)
        else:
            request.add_finalize_fn(lambda: self._publish(directory))
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Publish a background save that every rank has finished; cheap where there is none. Collective."""
        with self._naming(self.root):
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a background save. Collective."""
        with self._naming(self.root):
            self._queue.maybe_finalize_async_calls(blocking=True)

    @contextmanager
    def _naming(self, what: Path) -> Iterator[None]:
        try:
            yield
        except (Exception, CheckpointException) as error:  # torch's is a BaseException, and seldom says why
            newest = store.latest(self.root)
            kept = f"{newest} is complete and stays" if newest else "there is none before it"
            free = shutil.disk_usage(self.root).free / 1e9
            raise CheckpointError(
                f"{what}: could not be written ({error!r}), {free:.3f} GB are free there; {kept}; "
                "make room and start the run again"
            ) from error

    def load(self, directory: Path) -> store.Progress:
        """Fill model and optimizer from a checkpoint, whatever layout wrote it. Collective.

        Raises:
            CheckpointError: it is of another model, or holds more than tensors.
        """
        saved = arch_of(directory / ASSETS)
        if differing := _differences(saved, self._model.arch):
            raise CheckpointError(
                f"{directory}: a checkpoint of another model: {differing}; choose another run_dir"
            )
        reader = MetadataReader(directory)
        refuse_more_than_tensors(reader)
        with weights_only():
            state = dist_checkpointing.load(
                self._state(is_loading=True), str(directory), TorchDistLoadShardedStrategy(reader)
            )
        for key, module in self._keyed_modules():
            module.load_state_dict(state[key])
        self._optimizer.megatron.load_state_dict(state["optimizer"])
        return store.read_progress(directory)

    def _publish(self, directory: Path) -> None:
        if self._mesh.is_main:
            store.publish(directory)
            store.rotate(self.root, self._config)
        self._mesh.barrier()

    def _keyed_modules(self) -> list[tuple[str, Any]]:
        modules = self._model.modules
        return [("model" if len(modules) == 1 else f"model{i}", module) for i, module in enumerate(modules)]

    def _state(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            # Gathers over gloo, a parameter at a time, where the plain way holds a stage's optimizer on the GPU.
            "distrib_optim_fully_reshardable_mem_efficient": self._mesh.layout.dp > 1 and not ON_HOST,
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
def _main_stays_out_of_processes() -> Iterator[None]:
    """megatron-core's first save spawns a process on each rank, for a queue. multiprocessing would import the main
    module into it again, and with it torch: seconds of work for nothing."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _differences(saved: Arch, ours: Arch) -> str:
    """Shape facts in which two models differ; where a dtype was changed on the way is no matter."""
    return ", ".join(
        f"{name} {getattr(saved, name)!r} where the recipe's has {value!r}"
        for name, value in vars(ours).items()
        if name != "dtype" and getattr(saved, name) != value
    )
