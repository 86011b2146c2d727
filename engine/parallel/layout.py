"""Degrees of parallelism as checked arithmetic: how ranks, layers, packs divide. Opens no process group."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from paralign.models import rules_for
from paralign.models.errors import LayoutError
from paralign.models.weights import Rule, divides_heads

from ..config.decoding import Section

if TYPE_CHECKING:
    from paralign.models.arch import Arch


class LayoutConfig(Section):
    """The degrees of parallelism, by Megatron's names. The optimizer is always sharded over data parallel.

    Attributes:
        tensor_model_parallel_size: GPUs that share every matrix.
        pipeline_model_parallel_size: stages that the layers are divided into.
        virtual_pipeline_model_parallel_size: chunks of layers on a stage (interleaved schedule); null is one.
        sequence_parallel: divides norms and residuals along the sequence over the tensor-parallel ranks.
        num_layers_in_first_pipeline_stage: layers there, if uneven; the other stages share the rest evenly.
        num_layers_in_last_pipeline_stage: layers there, if uneven; the other stages share the rest evenly.
        overlap_grad_reduce: reduces gradients while the backward pass still runs.
        overlap_param_gather: gathers updated weights while the next forward pass already runs.
        ddp_bucket_size: parameters in a bucket of gradients; null leaves it to Megatron.
        distributed_timeout_minutes: how long a collective may wait before the run ends.
    """

    tensor_model_parallel_size: int = Field(ge=1)
    pipeline_model_parallel_size: int = Field(ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = Field(None, ge=1)
    num_layers_in_last_pipeline_stage: int | None = Field(None, ge=1)
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: int | None = Field(None, ge=1)
    distributed_timeout_minutes: int = Field(30, ge=1)

    @property
    def model_axes(self) -> dict[str, int]:
        """Ranks along the axes that divide one copy of the model."""
        return {"tp": self.tensor_model_parallel_size, "pp": self.pipeline_model_parallel_size}

    @model_validator(mode="after")
    def _agree(self) -> LayoutConfig:
        uneven = self.num_layers_in_first_pipeline_stage or self.num_layers_in_last_pipeline_stage
        pipelined = self.pipeline_model_parallel_size > 1
        for wrong, rule in (
            (
                self.sequence_parallel and self.tensor_model_parallel_size == 1,
                "sequence_parallel needs tensor_model_parallel_size of 2 or more; set it to false",
            ),
            (
                self.virtual_pipeline_model_parallel_size and not pipelined,
                "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of 2 or more; "
                "delete it",
            ),
            (
                uneven and not pipelined,
                "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage need "
                "pipeline_model_parallel_size of 2 or more; delete them",
            ),
            (
                self.overlap_param_gather and not self.overlap_grad_reduce,
                "overlap_param_gather needs overlap_grad_reduce; set it to true",
            ),
        ):
            if wrong:
                raise ValueError(rule)
        return self


# Every axis along which ranks divide the work, by Megatron's short names: tensor, context, data and pipeline
# parallel. The innermost first: ranks that talk the most stand nearest to one another.
AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class Layout:
    """A layout that fits its GPUs, model and batch.

    Attributes:
        config: the section of the recipe.
        sizes: ranks along each of AXES; along dp they are copies of the model.
        micro_batches: packs that each data-parallel rank computes in a full step.
    """

    config: LayoutConfig
    sizes: Mapping[str, int]
    micro_batches: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes.values())

    @property
    def tp(self) -> int:
        return self.sizes["tp"]

    @property
    def pp(self) -> int:
        return self.sizes["pp"]

    @property
    def dp(self) -> int:
        return self.sizes["dp"]

    @property
    def vpp(self) -> int:
        """Chunks of layers on each stage; 1 without interleaving."""
        return self.config.virtual_pipeline_model_parallel_size or 1

    @property
    def micro_batch_multiple(self) -> int:
        """What the micro-batches of a rank must be a multiple of, in training and in evaluation."""
        return _micro_batch_multiple(self.config)


def resolve(
    config: LayoutConfig, arch: Arch, *, world_size: int, global_batch_size: int, tokens_per_pack: int
) -> Layout:
    """Checks that the degrees divide GPUs, model and batch.

    Raises LayoutError with a line for each rule that is broken and the numbers that would keep it.
    """
    model_axes = config.model_axes
    tp = model_axes["tp"]
    problems = [*_tensor_problems(tp, arch), *_layer_problems(config, arch.num_layers)]
    if config.sequence_parallel and tokens_per_pack % tp:
        problems.append(
            f"sequence_parallel: tp {tp} does not divide tokens_per_pack {tokens_per_pack}; "
            f"{_neighbours(tokens_per_pack, tp)} would fit"
        )
    copy_size = math.prod(model_axes.values())
    if world_size % copy_size:
        degrees = " × ".join(f"{axis} {size}" for axis, size in model_axes.items())
        problems.append(
            f"{degrees} = {copy_size} does not divide {world_size} GPUs; "
            f"{_neighbours(world_size, copy_size)} would"
        )
        raise LayoutError("\n".join(problems))
    dp, multiple = world_size // copy_size, _micro_batch_multiple(config)
    if global_batch_size % (dp * multiple):
        factors = f"dp {dp}"
        if multiple > 1:
            factors += f" × pp {multiple} = {dp * multiple} (interleaved stages)"
        problems.append(
            f"global_batch_size {global_batch_size} is not a multiple of {factors}; "
            f"{_neighbours(global_batch_size, dp * multiple)} would be"
        )
    if problems:
        raise LayoutError("\n".join(problems))
    sizes = {axis: model_axes.get(axis, 1) for axis in AXES} | {"dp": dp}
    return Layout(config, sizes, global_batch_size // dp)


def layers_of_stage(layout: Layout, arch: Arch) -> list[list[list[int]]]:
    """`[pp_rank][vp_stage]` holds the global numbers of the layers there, by megatron-core's rule.

    Layers run through chunk 0 of every stage, then chunk 1 of every stage, and so on. Uneven first and last
    stages are divided into their chunks like all others (`get_num_layers_to_build`).
    """
    stages: list[list[list[int]]] = [[] for _ in range(layout.pp)]
    per_stage = _layers_per_stage(layout.config, arch.num_layers)
    first = 0
    for _ in range(layout.vpp):
        for stage, count in zip(stages, per_stage, strict=True):
            chunk = count // layout.vpp
            stage.append(list(range(first, first + chunk)))
            first += chunk
    return stages


def stage_rules(layout: Layout, arch: Arch) -> list[list[Rule]]:
    """For each pipeline rank the rules of the weights that it owns, in the order of the forward pass.

    Together each rule once: the last stage's copy of tied embeddings belongs to the first.
    """
    stage_of = {
        layer: stage
        for stage, chunks in enumerate(layers_of_stage(layout, arch))
        for chunk in chunks
        for layer in chunk
    }
    stages: list[list[Rule]] = [[] for _ in range(layout.pp)]
    for rule in rules_for(arch):
        if layer := re.match(r"decoder\.layers\.(\d+)\.", rule.native):
            stages[stage_of[int(layer[1])]].append(rule)
        else:
            stages[0 if rule.native.startswith("embedding.") else -1].append(rule)
    return stages


def _micro_batch_multiple(config: LayoutConfig) -> int:
    return config.pipeline_model_parallel_size if config.virtual_pipeline_model_parallel_size else 1


def _tensor_problems(tp: int, arch: Arch) -> list[str]:
    heads, groups, ffn = arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size
    broken = [
        what
        for what, wrong in (
            (f"{heads} attention heads", heads % tp),
            (f"an FFN of {ffn}", ffn % tp),
        )
        if wrong
    ]
    problems = [f"tp {tp} does not divide {' and '.join(broken)}"] if broken else []
    if groups % tp and tp % groups:
        problems.append(f"tp {tp} and {groups} KV heads: one must be a multiple of the other")
    if not problems:
        return []
    fits = [n for n in _divisors(heads) if divides_heads(n, heads, groups) and ffn % n == 0]
    return [f"{', and '.join(problems)}; {_or(fits)} would do"]


def _layers_per_stage(config: LayoutConfig, num_layers: int) -> list[int]:
    """Layers on each stage; what is left over is floored, `_layer_problems` refuses it beforehand."""
    first, last = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
    ends = [count for count in (first, last) if count is not None]
    middle = config.pipeline_model_parallel_size - len(ends)
    counts = [(num_layers - sum(ends)) // middle if middle else 0] * middle
    return ([first] if first is not None else []) + counts + ([last] if last is not None else [])


def _layer_problems(config: LayoutConfig, num_layers: int) -> list[str]:
    pp, vpp = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    first, last = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
    if first is None and last is None:
        if num_layers % (pp * vpp) == 0:
            return []
        if num_layers % pp == 0:
            chunks = [n for n in _divisors(num_layers // pp) if n > 1]
            remedy = f"vpp {_or(chunks)} would, or none" if chunks else "leave vpp out"
        else:
            fits = [n for n in _divisors(num_layers) if n <= 2 * pp]
            remedy = f"pp {_or(fits)} would, or give num_layers_in_first/last_pipeline_stage"
        stages = f"pp {pp} × vpp {vpp} = {pp * vpp} chunks" if vpp > 1 else f"pp {pp} stages"
        return [f"{num_layers} layers do not divide into {stages}; {remedy}"]
    stages_left = pp - (first is not None) - (last is not None)
    left = num_layers - (first or 0) - (last or 0)
    taken = " and ".join(
        f"{count} on the {end} stage"
        for end, count in (("first", first), ("last", last))
        if count is not None
    )
    if stages_left == 0:
        if left:
            return [f"{taken} of pp {pp} are not the {num_layers} layers of the model; make them add up"]
        if vpp > 1:  # megatron-core 0.16 divides by the number of stages in between
            return [
                "vpp needs a stage whose layers are not given; give only num_layers_in_first_pipeline_stage"
            ]
    elif left < stages_left or left % stages_left:
        return [
            f"{taken} leave {left} of {num_layers} layers for {stages_left} stages of equal size; "
            f"leave a multiple of {stages_left}"
        ]
    return [
        f"vpp {vpp} does not divide the {count} layers of a stage ({taken}); every stage has vpp equal chunks"
        for count in dict.fromkeys(_layers_per_stage(config, num_layers))
        if count % vpp
    ]


def _neighbours(value: int, step: int) -> str:
    below = value // step * step
    return _or([below, below + step] if below else [step])


def _divisors(value: int) -> list[int]:
    return [n for n in range(1, value + 1) if value % n == 0]


def _or(values: list[int]) -> str:
    names = [str(value) for value in values]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
