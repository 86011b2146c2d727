"""From shape facts and a layout to model chunks, and weights that exist nowhere; writes Megatron's configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from paralign.models import rules_for
from paralign.models.arch import Arch
from paralign.models.decoder import Decoder, Parts
from paralign.models.mcore import (
    ON_HOST,
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TransformerConfig,
    finalize_model_grads,
    parallel_state,
)

from ..backends import Backend
from ..config.model import ModelConfig
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Read = Callable[[str], torch.Tensor]  # a tensor by its Hugging Face name


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(arch: Arch, layout: Layout, model: ModelConfig, backend: Backend) -> TransformerConfig:
    """Megatron's configuration of one model at one layout."""
    parallel = layout.config
    dtype = DTYPES[model.dtype]
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    config = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        layernorm_epsilon=arch.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,  # also what sums their gradients over tensor-parallel ranks
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        recompute_granularity=model.recompute_granularity,
        recompute_method=model.recompute_method,
        recompute_num_layers=model.recompute_num_layers,
        recompute_modules=[],
        deterministic_mode=model.deterministic,
        # Weights always come from somewhere else, but only this path marks tensor-parallel parameters;
        # without the marks the gradient norm is silently wrong.
        perform_initialization=True,
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        # The loss is divided by global counts before the backward pass (step.py), never by Megatron.
        calculate_per_token_loss=True,
        # gloo matches messages between two ranks by order alone; overlapped, activations and gradients that
        # cross between two stages are taken for one another, without an error.
        overlap_p2p_comm=interleaved and not ON_HOST,
        batch_p2p_comm=not interleaved and not ON_HOST,
        # It would wait for the whole GPU after each message, against a fault that torch mended in 2022 (its pull
        # request 82450): what followed `wait` was not ordered behind the message.
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,
        **backend.config(),
    )
    config.recompute_modules = list(model.recompute_modules)  # Megatron's check knows no dense activation
    return config


def build_chunks(config: TransformerConfig, arch: Arch, mesh: Mesh, parts: Parts) -> list[Decoder]:
    """This rank's share of the layers: one chunk, or one for each virtual stage. Weights are not set yet."""
    n_chunks = config.virtual_pipeline_model_parallel_size
    stages: Sequence[int | None] = [None] if n_chunks is None else range(n_chunks)
    with torch.device(mesh.device):
        return [
            Decoder(
                config,
                arch,
                parts,
                padded_vocab_size=padded_vocab_size(arch, mesh.tp.size),
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
            )
            for stage in stages
        ]


def padded_vocab_size(arch: Arch, tp: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel degree."""
    return -(-arch.vocab_size // tp) * tp


def random_weights(arch: Arch, *, seed: int, dtype: torch.dtype, device: torch.device) -> Read:
    """A reader of weights that exist nowhere: N(0, 0.02²) matrices, zero biases, unit norms.

    Each tensor has its own generator, seeded by its name, so that a model is the same at every layout.
    """
    shapes = {name: shape for rule in rules_for(arch) for name, shape in zip(rule.hf, rule.hf_shapes)}

    def read(name: str) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, value, dtype=dtype, device=device)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype)

    return read


def wrap_for_data_parallel(
    chunks: Sequence[Decoder], config: TransformerConfig, layout: Layout
) -> list[DistributedDataParallel]:
    """Megatron's data parallelism with gradients reduced in fp32 and scattered over the optimizer's shards."""
    parallel = layout.config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        # Fatal where it fires; the reduced norm is tested instead (optim.py), once, on all ranks alike.
        check_for_nan_in_grad=False,
        bucket_size=parallel.ddp_bucket_size,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = _finalize_gradients
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def _finalize_gradients(model: list, num_tokens: object = None, **kwargs: object) -> None:
    """Reduce gradients; they are already divided, so Megatron's token count is dropped."""
    del num_tokens
    finalize_model_grads(model, None, **kwargs)
