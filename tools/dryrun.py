"""One rank of a run without its GPU: what it holds, in a few seconds on one core and half a gigabyte of memory.

    python -m paralign.tools.dryrun recipes/sft/llama3_70b.yaml --gpus 32 --rank 0 [model.hf=DIRECTORY …]

The engine's own mesh, model, data parallelism, optimizer and step run on fake tensors, which have shapes and no
bytes, in a process group that answers at once. Every storage is followed from its birth to its death.

It does not see what passes by torch's operations: what the allocator leaves unused, NCCL's buffers (1 to 2 GB), the
CUDA context (0.5 GB), workspaces of cuBLAS and of attention's backward pass. Nor what a step does besides its passes:
other models that fill columns, and the update. Moments are taken to be on the GPU.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.attention.varlen  # its operation
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from paralign.engine.backends.ours import Ours
from paralign.engine.batch import Column, Head, Kind, PackedBatch, StepBatch, Unit
from paralign.engine.checkpoint.hf import arch_of
from paralign.engine.config.model import ModelConfig
from paralign.engine.config.optimizer import OptimizerConfig
from paralign.engine.data.answers import Answer, AnswerLayout, Group
from paralign.engine.data.pack import pack_chats, pack_groups
from paralign.engine.kernels import token_statistics
from paralign.engine.objectives import Objective, build_objective
from paralign.engine.parallel.layout import Layout
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.run.recipe import Recipe, load
from paralign.engine.training.build import build_chunks, transformer_config
from paralign.engine.training.model import Model
from paralign.engine.training.optim import Optimizer
from paralign.engine.training.step import run_own
from paralign.models.arch import Arch
from paralign.models.attention import Kernel
from paralign.models.errors import ParalignError
from paralign.models.mcore import ON_HOST, tensor_parallel
from paralign.models.segments import Segments
from paralign.models.weight_gradient import APEX_NAME

ADAMW = OptimizerConfig.model_validate({"lr": 1e-5, "lr_decay_style": "constant", "weight_decay": 0.1})


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds.

    Attributes:
        weights: of the model.
        gradients: with their buffers.
        optimizer: with the optimizer's state: what a step begins with.
        peak: at most, in the forward and backward passes of a step.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: int


def dry_run(
    arch: Arch, layout: Layout, model: ModelConfig, objective: Objective, *, rank: int, tokens_per_pack: int
) -> Held:
    """What a rank of a run holds, on GPUs with the fused kernels.

    Packs are full, and every token of an answer is learned; there are as many as fill the pipeline.

    Raises:
        ValueError: there is no such rank; or this process is in a process group, or sees GPUs.
    """
    if not ON_HOST:
        raise ValueError("dry_run: runs on the CPU alone; start it with CUDA_VISIBLE_DEVICES= set to nothing")
    if dist.is_initialized():
        raise ValueError("dry_run: this process is in a process group; start one of its own for it")
    if not 0 <= rank < layout.world_size:
        raise ValueError(
            f"dry_run: rank {rank} of {layout.world_size}; give one from 0 to {layout.world_size - 1}"
        )
    storages, backend = _Storages(), _OnGPU()
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        with (
            _pretended(storages),
            open_mesh(layout, local_rank=0, seed=0) as mesh,
            FakeTensorMode(allow_non_fake_inputs=True),
            storages,
        ):
            if objective.head is Head.SCALAR:
                arch = arch.with_scalar_head()
            config = transformer_config(arch, layout, model, backend)
            parts = backend.parts(arch, mesh.device, config.params_dtype)
            opened = Model(build_chunks(config, arch, mesh, parts), config, arch, mesh)
            weights = storages.live
            opened.prepare_to_train()
            gradients = storages.live
            optimizer = Optimizer(opened.chunks, ADAMW, layout, config.params_dtype, fused=True)
            state = storages.live
            n_packs = min(layout.micro_batches, 2 * layout.pp)
            packs = [_full_pack(objective, tokens_per_pack, mesh.device) for _ in range(n_packs)]
            optimizer.zero_grad()
            storages.peak = storages.live
            run_own(opened, StepBatch(packs, dict.fromkeys(Unit, 1.0), 1, 1, ()), objective, train=True)
            return Held(weights, gradients, state, storages.peak)
    finally:
        dist.destroy_process_group()


class _OnGPU(Ours):
    """Our backend as it is where the kernels are built, wherever this runs."""

    @property
    def fuses_updates(self) -> bool:
        return True

    def _attention_kernel(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> Kernel:
        return _flash_attention


def _flash_attention(q_THD: Tensor, k_UGD: Tensor, v_UGD: Tensor, segments: Segments, scale: float) -> Tensor:
    """What flash attention keeps and gives, by torch's own account of it; grouped keys are not copied."""
    sizes = (segments.cu_seqlens_q, segments.cu_seqlens_kv, segments.max_seqlen_q, segments.max_seqlen_kv)
    out: Tensor = torch.ops.torch_attn._varlen_attn(q_THD, k_UGD, v_UGD.contiguous(), *sizes)[0]
    return out


class _Storages(TorchDispatchMode):
    """Follows the storages of all tensors that operations give. Collectives are done as soon as they are asked for.

    Attributes:
        live, peak: bytes, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            return self._collective(func, args)
        return tree_map_only(Tensor, self._see, func(*args, **(kwargs or {})))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Whoever changes a storage's size says so."""
        if (key := storage._cdata) in self._sizes:
            self.live += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            self.resized(storage)
            weakref.finalize(storage, self._gone, storage._cdata)
        return tensor

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    @staticmethod
    def _collective(func: Any, args: Any) -> Any:
        """What c10d's operations give: work that is done, some behind the tensors that they write."""
        names = [argument.name for argument in func._schema.arguments]
        with _disable_current_modes():
            group = args[names.index("process_group")]
            work = torch.ops.c10d.barrier(torch.empty(0), group, [])
        return work if len(func._schema.returns) == 1 else (args[0], work)


@contextmanager
def _pretended(storages: _Storages) -> Iterator[None]:
    """What cannot be done with fake tensors, or on the CPU is done in another way than on a GPU."""
    new_group, resize = dist.new_group, torch.UntypedStorage.resize_

    def fake_group(ranks: Any = None, *_: Any, **options: Any) -> Any:
        return new_group(ranks, backend="fake", group_desc=options.get("group_desc"))

    def say_alike(found: list, own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    def resize_and_tell(storage: Any, size: int) -> Any:
        resize(storage, size)
        storages.resized(storage)
        return storage

    def nothing(*_: Any) -> None:
        """On a GPU the product goes into the buffer that is there."""

    random = tensor_parallel.random
    changes: dict[Any, dict[str, Any]] = {
        dist: {"new_group": fake_group, "all_gather_object": say_alike},
        torch.UntypedStorage: {"resize_": resize_and_tell, "copy_": lambda storage, *_: storage},
        random.CudaRNGStatesTracker: {"fork": lambda *_: nullcontext()},
        random: {"_get_all_rng_states": tuple, "_set_all_rng_states": nothing},
        token_statistics: {"_may_look": lambda _: False, "accumulate": nothing},
        import_module(APEX_NAME): {"wgrad_gemm_accum_fp32": nothing},
    }
    with ExitStack() as stack:
        for place, names in changes.items():
            stack.enter_context(mock.patch.multiple(place, **names))
        yield


def _full_pack(objective: Objective, tokens_per_pack: int, device: torch.device) -> PackedBatch:
    """Four conversations; or four prompts, each half of its group, with two answers."""
    rows = tokens_per_pack // 4
    tokens = np.ones(rows, dtype=np.int64)
    if objective.reads is Kind.CONVERSATIONS:
        return pack_chats([(tokens, tokens)] * 4, tokens_per_pack, device)
    prompt, answer = tokens[: rows // 2], tokens[: (rows - rows // 2 - 1) // 2]
    answers = (Answer(answer, np.ones(len(answer))), Answer(answer, np.ones(len(answer))))
    layout = AnswerLayout(objective.needs, objective.head, share_prefix=True)
    pack = pack_groups([Group(prompt, answers)] * 4, tokens_per_pack, device, layout)
    per_segment = torch.zeros(len(pack.segments.bounds), dtype=torch.float64)
    filled = {Column.REF_LOGPROB: per_segment, Column.BASELINE: torch.zeros(())}
    pack.columns = {**filled, **pack.columns}
    return pack


def _of_recipe(recipe: Recipe, gpus: int, rank: int) -> Held:
    arch, tokens_per_pack = arch_of(recipe.model.hf), recipe.data.tokens_per_pack
    layout = recipe.resolve_layout(arch, gpus)
    objective = build_objective(recipe.objective)
    return dry_run(arch, layout, recipe.model, objective, rank=rank, tokens_per_pack=tokens_per_pack)


def main() -> None:
    parser = argparse.ArgumentParser(description="What one rank of a run holds, computed without a GPU.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0, help="0 is of the first stage, the last of the last")
    arguments = parser.parse_intermixed_args()
    try:
        held = _of_recipe(load(arguments.recipe, arguments.overrides), arguments.gpus, arguments.rank)
    except (ParalignError, ValueError) as error:
        parser.error(str(error))
    for what, n_bytes in (
        ("weights", held.weights),
        ("and gradients", held.gradients),
        ("and optimizer", held.optimizer),
        ("at most in a step", held.peak),
    ):
        print(f"{what:18} {n_bytes / 1e9:7.2f} GB")


if __name__ == "__main__":
    main()
