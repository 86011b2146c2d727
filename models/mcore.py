"""The only door to megatron-core: installs the host hook, then names the parts in use. Nobody else imports it."""

# ruff: noqa: F401  (the names are for others)

import logging
import warnings
from queue import Queue, SimpleQueue
from typing import Any

from . import host, weight_gradient

ON_HOST = host.install()
weight_gradient.install()

with warnings.catch_warnings():
    # Some twenty lines that say Transformer Engine and apex are absent; the start-up block says once what is used.
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, optimizer, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
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

# The same absences again, at every construction of a layer.
logging.getLogger("megatron.core").setLevel(logging.ERROR)


class TorchDistSaveShardedStrategy(torch_strategies.TorchDistSaveShardedStrategy):
    """megatron-core's, without its processes: it would spawn a manager on each rank, which outlives the rank.

    A request of `async_save` has a plain queue as its third argument; whoever writes puts the results there, by the
    number of the bucket, before the finalize functions run.
    """

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> AsyncRequest:
        """See megatron-core."""
        theirs = filesystem_async._get_write_results_queue
        filesystem_async._get_write_results_queue = SimpleQueue
        try:
            return super().async_save(sharded_state_dict, checkpoint_dir)
        finally:
            filesystem_async._get_write_results_queue = theirs


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


class TorchDistLoadShardedStrategy(torch_strategies.TorchDistLoadShardedStrategy):
    """megatron-core's, with a reader of the caller's: megatron-core makes one by a function of its own module."""

    def __init__(self, reader: Any) -> None:
        super().__init__()
        self._reader = reader

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """See megatron-core."""
        theirs = torch_strategies._get_filesystem_reader
        torch_strategies._get_filesystem_reader = lambda *_, **__: self._reader
        try:
            return super().load(sharded_state_dict, checkpoint_dir)
        finally:
            torch_strategies._get_filesystem_reader = theirs


def build_optimizer(
    kind: type[DistributedOptimizer], config: OptimizerConfig, chunks: list[DistributedDataParallel]
) -> Any:
    """megatron-core's optimizer of the chunks, made of `kind`: it names the class in its own module."""
    theirs = optimizer.DistributedOptimizer
    optimizer.DistributedOptimizer = kind
    try:
        return optimizer.get_megatron_optimizer(config, chunks)
    finally:
        optimizer.DistributedOptimizer = theirs
