"""A model as this rank holds its share of it: opened, filled, read, handed on, lent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paralign.models import rules_for
from paralign.models.arch import Arch
from paralign.models.errors import WeightsError
from paralign.models.head_read import HeadOutput, HeadRead
from paralign.models.mcore import DistributedDataParallel, TransformerConfig, get_forward_backward_func

from ..backends import Backend, backend_of
from ..batch import PackedBatch
from ..config.model import ModelConfig
from ..parallel.layout import stage_rules
from ..parallel.mesh import Mesh
from .build import Read, build_chunks, transformer_config, wrap_for_data_parallel

BUCKET_BYTES = 2**28  # of whole tensors that are gathered before they are handed on

Ask = Callable[[PackedBatch], HeadRead]
Loss = Callable[..., tuple[Tensor, Tensor, Tensor]]  # of (out, pack=…): Megatron's (loss, count, report)


class Model:
    """Module chunks at a layout, one for each virtual stage of this rank, and what is done with all of them.

    Attributes:
        arch: shape facts of the whole model.
        mesh: where this rank stands.
        config: Megatron's, for this layout.
        modules: this rank's chunks.
        chunks: the same as the schedule takes them; after `prepare_to_train` wrapped for data parallelism.
    """

    def __init__(self, modules: Sequence[Any], config: TransformerConfig, arch: Arch, mesh: Mesh) -> None:
        self.arch, self.mesh, self.config = arch, mesh, config
        self.modules: list[Any] = list(modules)
        self.chunks: list[Any] = self.modules

    @classmethod
    def open(
        cls, arch: Arch, mesh: Mesh, section: ModelConfig, read: Read, backend: Backend | None = None
    ) -> Model:
        """Builds this rank's share and fills it; see `load`. Collective.

        Args:
            section: precision and recomputation, and the backend where none is given.
        """
        backend = backend or backend_of(section)
        config = transformer_config(arch, mesh.layout, section, backend)
        parts = backend.parts(arch, mesh.device, config.params_dtype)
        model = cls(build_chunks(config, arch, mesh, parts), config, arch, mesh)
        model.load(read)
        return model

    def load(self, read: Read) -> None:
        """Fill every parameter by the weight rules.

        The ranks of the first copy of the model read the slices that they own and nothing else, and send them to
        their peers in the other copies: the file system is read once, however many copies train. Collective.

        Raises:
            WeightsError: a parameter has no rule, or its rule gives another shape.
        """
        rules = {rule.native: rule for rule in rules_for(self.arch)}
        with torch.no_grad():
            for name, parameter in self.named_weights():
                if name not in rules:
                    raise WeightsError(
                        f"{name}: no weight rule of family {self.arch.family} makes this parameter"
                    )
                if self.mesh.dp.rank == 0:
                    shard = rules[name].slice(read, self.mesh.tp.rank, self.mesh.tp.size)
                    if shard.shape != parameter.shape:
                        raise WeightsError(
                            f"{name}: its rule gives {tuple(shard.shape)}, "
                            f"the model wants {tuple(parameter.shape)}"
                        )
                    parameter.copy_(shard)
                self.mesh.send_to_copies(parameter)

    def prepare_to_train(self) -> None:
        """Wrap the chunks in Megatron's data parallelism, which gives each parameter a gradient buffer."""
        self.chunks = wrap_for_data_parallel(self.modules, self.config, self.mesh.layout)

    def named_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters under the names of the weight rules."""
        for module in self.modules:
            yield from module.named_weights()

    def synchronize(self) -> None:
        """Make the weights current on every rank.

        With `overlap_param_gather` the gather of an update is left to the next forward pass; whoever reads weights
        before that calls this first.
        """
        for chunk in self.chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def run(self, packs: Sequence[PackedBatch], ask: Ask, loss: Loss, *, train: bool) -> list[Tensor]:
        """Megatron's schedule over this rank's packs.

        Args:
            packs: as many as on any other rank, all of one length; none is nothing to do.
            ask: what the head is to give of a pack.
            loss: what is made of it.

        Returns:
            What `loss` reported of each pack, in their order, on ranks of the last stage; elsewhere nothing.
        """
        if not packs:
            return []
        chunks, iterators = self.chunks, [iter(packs) for _ in self.chunks]
        results: list[Tensor] = get_forward_backward_func()(
            forward_step_func=partial(_forward, ask=ask, loss=loss),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(packs),
            seq_length=packs[0].tokens_T.shape[0],
            micro_batch_size=1,
            forward_only=not train,
        )
        return results

    def read(
        self, packs: Sequence[PackedBatch], ask: Ask, keep: Callable[[HeadOutput, PackedBatch], Tensor]
    ) -> list[Tensor]:
        """Forward passes without gradients.

        Args:
            packs: this rank's; see `run`.
            ask: what the head is to give of a pack.
            keep: what to keep of a pack, from what the head gave.

        Returns:
            What was kept, in the order of the packs, on ranks of the last stage; elsewhere nothing.
        """

        def report(out: HeadOutput, *, pack: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
            nothing = torch.zeros((), device=self.mesh.device)
            return nothing, nothing.int(), keep(out, pack)

        with torch.no_grad():
            return self.run(packs, ask, report, train=False)

    def tensors(self, bucket_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        """The whole tensors by Hugging Face name, a bucket at a time: for an export, or a rollout engine.

        Collective: every rank goes to the end. On the first rank of each stage's tensor-parallel group, in the first
        copy of the model, the buckets hold that stage's tensors; elsewhere they are empty, or there are none.

        Args:
            bucket_bytes: no bucket holds more, but for one of a single native tensor that is larger.
        """
        self.synchronize()
        if self.mesh.dp.rank > 0:
            return
        rules = {rule.native: rule for rule in stage_rules(self.mesh.layout, self.arch)[self.mesh.pp.rank]}
        bucket: dict[str, Tensor] = {}
        gathered = 0
        for native, parameter in self.named_weights():
            if native not in rules:  # the copy of tied embeddings on the last stage
                continue
            rule, shards = rules[native], [parameter.detach()]
            nbytes = parameter.nbytes * (self.mesh.tp.size if rule.split is not None else 1)
            if gathered and gathered + nbytes > bucket_bytes:
                yield bucket
                bucket, gathered = {}, 0
            gathered += nbytes
            if rule.split is not None:
                shards = self._gathered(shards[0])
            if self.mesh.tp.rank == 0:
                bucket |= rule.join(shards)
        if gathered:
            yield bucket

    def _gathered(self, shard: Tensor) -> list[Tensor]:
        """The shards of all tensor-parallel ranks, on the first of them."""
        into = None
        if self.mesh.tp.rank == 0:
            into = [torch.empty_like(shard) for _ in range(self.mesh.tp.size)]
        dist.gather(shard.contiguous(), into, group=self.mesh.tp.group, group_dst=0)
        return into or []

    @contextmanager
    def lent(self, read: Read, *, scalar_head: bool = False) -> Iterator[Model]:
        """Other frozen weights in this model's place, so that no second model is in memory; yields who reads them.

        This model's own bytes wait in the host's memory and come back at the end, also after an error: not a bit of
        the weights, or of what an optimizer keeps of them, is changed. Nothing may be trained meanwhile. Collective.

        Args:
            read: reads the other weights; see `load`.
            scalar_head: they are those of a reward model of this architecture. It brings its head; ours stays.
        """
        self.synchronize()
        borrower = self
        if scalar_head and not self.arch.scalar_head:
            modules = [module.under_scalar_head() for module in self.modules]
            borrower = Model(modules, self.config, self.arch.with_scalar_head(), self.mesh)
        parameters = [parameter for _, parameter in borrower.named_weights()]
        own = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        try:
            borrower.load(read)
            yield borrower
        finally:
            with torch.no_grad():
                for parameter, kept in zip(parameters, own):
                    parameter.copy_(kept)


def _forward(packs: Iterator[PackedBatch], module: Any, *, ask: Ask, loss: Loss) -> tuple[Any, Any]:
    pack = next(packs)
    return module(pack.tokens_T, pack.segments, ask(pack)), partial(loss, pack=pack)
