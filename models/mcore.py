"""The only door to megatron-core: installs the host hook, then names the parts in use. Nobody else imports it.

It opens to 0.16.1 and to each later version up to 0.19. What differs between them is dealt with here.
"""

# ruff: noqa: F401  (the names are for others)

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Queue, SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from . import host, known_warnings, weight_gradient
from .errors import CheckpointError

ON_HOST = host.install()
weight_gradient.install()

with warnings.catch_warnings():
    known_warnings.ignore()
    from megatron.core import __version__ as VERSION
    from megatron.core import dist_checkpointing, optimizer, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        distributed_data_parallel,
        finalize_model_grads,
    )
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import OptimizerConfig, distrib_optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import transformer_layer
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType, ModelType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def _leave_out(module: ModuleType, beginning: str) -> None:
    """Lines that a module logs in every run."""
    logging.getLogger(module.__name__).addFilter(
        lambda record: not record.getMessage().startswith(beginning),
    )


# A checkpoint's directory holds the recipe before megatron-core writes there.
_leave_out(serialization, "Overwriting old incomplete")
# Its own MLP by another name; what it is not given then, it finds by itself.
_leave_out(transformer_layer, "Unknown MLP type")
# 0.19 would have buckets laid out by its caller, a child written by another library, and no `common.pt` read.
_leave_out(distributed_data_parallel, "DistributedDataParallel: full_param_layout not provided")
_leave_out(torch_strategies, "MCore's async save is deprecated")
_leave_out(common, "load_common is deprecated")


@contextmanager
def _renamed(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """The functions of a module find `value` under a name of theirs."""
    theirs = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, theirs)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """megatron-core's optimizer describes its state and collects no garbage then, which takes up to a second."""
    with _renamed(distrib_optimizer, "gc", SimpleNamespace(collect=lambda: None)):
        yield


class TorchDistSaveShardedStrategy(torch_strategies.TorchDistSaveShardedStrategy):
    """megatron-core's, without its processes: it would spawn a manager on each rank, which outlives the rank.

    A request of `async_save` has a plain queue as its third argument; whoever writes puts the results there, by the
    number of the bucket, before the finalize functions run.
    """

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, *writer: str) -> AsyncRequest:
        """See megatron-core; its own writer, where 0.17 would take that of nvidia-resiliency-ext."""
        del writer
        names_a_writer = hasattr(torch_strategies, "get_async_strategy")
        queue = "get_write_results_queue" if names_a_writer else "_get_write_results_queue"
        with _renamed(filesystem_async, queue, SimpleQueue):
            return super().async_save(
                sharded_state_dict, checkpoint_dir, *(["mcore"] if names_a_writer else [])
            )


def staged(request: AsyncRequest) -> list[Any]:
    """What a rank is to write, in the host's memory: a device's tensors copied to pinned memory, all at once.

    torch keeps pinned memory for the next save. A child may share what is pinned with this process, so that tensors
    which lie there already are copied as well.
    """
    buckets = [
        (
            path,
            name,
            (objects, [(item, value.clone() if value.is_pinned() else value) for item, value in tensors]),
        )
        for path, name, (objects, tensors) in request.async_fn_args[1]
    ]
    return filesystem_async.FileSystemWriterAsync.preload_tensors(buckets, non_blocking=True)


def write_bucket(transforms: list[Any], number: int, bucket: Any) -> list[Any]:
    """What megatron-core's writer does in a process of its own: one file, brought to the disk; its write results.

    Raises:
        Exception: what went wrong with it.
    """
    results: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    waiting: Queue[int] = Queue()
    waiting.put(number)
    writer = filesystem_async.FileSystemWriterAsync
    writer.write_preloaded_data(transforms, number, bucket, results, waiting, use_fsync=True)
    _, found = results.get()
    if isinstance(found, Exception):
        raise found
    return found


@contextmanager
def read_through(reader: Any) -> Iterator[None]:
    """megatron-core loads a checkpoint through this reader, and not through torch's, which unpickles what it finds.

    It makes its readers by a function. 0.19 has that under a second name as well: it reads from a file of tensors
    what was in `common.pt` before.

    Raises:
        CheckpointError: 0.19 or a later version has saved it, and this is an older one.
    """
    places = [
        module for module in (torch_strategies, serialization) if hasattr(module, "_get_filesystem_reader")
    ]
    common = Path(reader.path, "common.pt")
    if serialization not in places and not common.exists():
        raise CheckpointError(
            f"{common}: missing; megatron-core 0.19 and later save without it, and {VERSION} cannot load that: "
            "install a later one"
        )
    with ExitStack() as stack:
        for module in places:
            stack.enter_context(_renamed(module, "_get_filesystem_reader", lambda *_, **__: reader))
        yield


def activation(function: Callable[[torch.Tensor], torch.Tensor]) -> type[MegatronModule]:
    """The function as a module without weights; since 0.17 megatron-core's MLP takes no plain function."""

    class Activation(MegatronModule):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    return Activation


def build_optimizer(
    kind: type[DistributedOptimizer], config: OptimizerConfig, chunks: list[DistributedDataParallel]
) -> Any:
    """megatron-core's optimizer of the chunks, made of `kind` over torch's AdamW.

    Where Transformer Engine or apex can be imported it would take their Adam. That counts steps for a group of
    parameters, and torch's for each of them would be left out of checkpoints: a resumed run would begin again at
    step 1, and say nothing. So it is told for good that neither is there: it asks at each save and load.

    Raises:
        RuntimeError: it took another optimizer all the same.
    """
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    with _renamed(optimizer, "DistributedOptimizer", kind):
        made = optimizer.get_megatron_optimizer(config, chunks)
    for part in made.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.AdamW):
            taken = f"{type(part.optimizer).__module__}.{type(part.optimizer).__name__}"
            raise RuntimeError(f"megatron-core {VERSION} took {taken} where torch's AdamW is meant")
    return made


def gradients_for_norm(part: DistributedOptimizer) -> list[torch.Tensor]:
    """The gradients whose squares this rank adds to the norm, each counted on one rank; 0.19 has renamed it."""
    by_name = "get_main_grads_for_grad_norm", "get_grads_for_grad_norm"
    return getattr(part, next(name for name in by_name if hasattr(part, name)))()


def initialize_model_parallel(*degrees: Any, **options: Any) -> None:
    """megatron-core's, with one process group for each set of ranks and backend.

    It makes one for each purpose: 229 at tp 4, pp 4, dp 2, over 79 sets of ranks. All ranks wait for each other when
    a group is made, and one that is used has connections and buffers of its own.
    """
    theirs = parallel_state.create_group
    made: dict[tuple[tuple[int, ...], str], Any] = {}

    def create_group(ranks: Sequence[int], *, backend: str | None = None, **options: Any) -> Any:
        key = tuple(sorted(ranks)), backend or dist.get_backend()
        if key not in made:
            made[key] = theirs(ranks, backend=backend, **options)
        return made[key]

    with _renamed(parallel_state, "create_group", create_group):
        parallel_state.initialize_model_parallel(*degrees, **options)
