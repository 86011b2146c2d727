"""Several models of one shape into one, tensor by tensor; the formulas stand in merge_methods.py.

The configuration has MergeKit's vocabulary, so that its files run here as they are, as long as they merge
whole models: no slices, no gradients of values, no other tokenizer than the parents'.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from paralign import __version__
from paralign.models import rules_for
from paralign.models.errors import WeightsError
from paralign.models.weights import Rule, Views, in_blocks

from ..config.decoding import Section, decode
from ..config.recipe_file import dump_yaml, load_recipe_file
from ..data.tokenizer import vocabulary
from . import merge_methods as methods
from .convert import state_of
from .manifest import MANIFEST, Digest, fingerprint
from .source import ModelSource, open_source
from .tensor_digest import digest
from .writing import Kind, Report, WriteOptions, dtype_named, refuse_unless_empty, write_model

MethodName = Literal["linear", "task_arithmetic", "model_stock", "slerp", "ties", "dare_ties"]
WITH_BASE = ("task_arithmetic", "model_stock", "slerp", "ties", "dare_ties")
CARD = "README.md"


class ModelParameters(Section):
    """What a method takes for each model; for all of them at once in the top `parameters`.

    Attributes:
        weight: factor of the model, or of its difference from the base.
        density: share of the differences that stays, for ties and dare_ties.
    """

    weight: float | None = None
    density: float | None = Field(default=None, gt=0, le=1)


class MergeParameters(ModelParameters):
    """What a method takes as a whole, and defaults for each model.

    Attributes:
        weight, density: see `ModelParameters`; 1 where neither place gives them.
        normalize: divides by the weights' sum; null is true for linear and ties, false elsewhere.
        lambda: factor of the merged difference, for task_arithmetic, ties and dare_ties.
        t: 0 is the base model, 1 the other, for slerp.
        filter_wise: an angle for each row instead of each tensor, for model_stock.
    """

    normalize: bool | None = None
    scale: float = Field(default=1.0, alias="lambda")
    t: float | None = Field(default=None, ge=0, le=1)
    filter_wise: bool = False


class MergedModel(Section):
    """One parent.

    Attributes:
        model: a Hugging Face directory or a native checkpoint.
        parameters: of this model.
    """

    model: Path
    parameters: ModelParameters = Field(default_factory=ModelParameters)


class MergeConfig(Section):
    """A merge, in MergeKit's words.

    Attributes:
        merge_method: linear, task_arithmetic, model_stock, slerp, ties or dare_ties.
        models: the parents; the base may be among them.
        base_model: what differences are taken from; linear takes none.
        parameters: of the method, and defaults for each model.
        dtype: of the result: float32, bfloat16 or float16; null is that of the parents.
    """

    merge_method: MethodName
    models: tuple[MergedModel, ...] = Field(min_length=1)
    base_model: Path | None = None
    parameters: MergeParameters = Field(default_factory=MergeParameters)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def others(self) -> tuple[MergedModel, ...]:
        """The parents without the base."""
        return tuple(entry for entry in self.models if entry.model != self.base_model)

    @property
    def weights(self) -> list[float]:
        """One for each of `others`."""
        return [_first(entry.parameters.weight, self.parameters.weight, 1.0) for entry in self.others]

    @property
    def densities(self) -> list[float]:
        """One for each of `others`."""
        return [_first(entry.parameters.density, self.parameters.density, 1.0) for entry in self.others]

    @property
    def normalize(self) -> bool:
        if self.parameters.normalize is None:
            return self.merge_method in ("linear", "ties")
        return self.parameters.normalize

    @model_validator(mode="after")
    def _agree(self) -> MergeConfig:
        name, count = self.merge_method, len(self.others)
        if name in WITH_BASE and self.base_model is None:
            raise ValueError(
                f"merge_method {name} needs base_model, which differences are taken from; give it"
            )
        if name == "linear" and self.base_model is not None:
            raise ValueError("merge_method linear takes no base_model; list it in models with a weight")
        if name == "slerp" and (count != 1 or self.parameters.t is None):
            raise ValueError(
                f"merge_method slerp needs parameters.t and one model besides base_model; there are {count}"
            )
        if name == "model_stock" and count < 2:
            raise ValueError(
                f"merge_method model_stock needs two models or more besides base_model; there is {count}"
            )
        if count == 0:
            raise ValueError("models: only base_model is named; name what is to be merged into it")
        weighs = name not in ("slerp", "model_stock")
        if weighs and (not any(self.weights) or (self.normalize and abs(sum(self.weights)) < 1e-8)):
            raise ValueError(
                f"the weights {', '.join(f'{weight:g}' for weight in self.weights)} sum to zero; "
                "give others, or parameters.normalize: false with weights that are not all zero"
            )
        return self


def load_merge(path: Path) -> MergeConfig:
    """Reads a merge's YAML file. Raises RecipeError with a line for each problem."""
    return decode(MergeConfig, *load_recipe_file(path), path)


def merge(
    config: MergeConfig,
    dst: Path,
    *,
    to: Kind = "hf",
    max_shard_size: str = "5GB",
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> Report:
    """Writes the merged model, its manifest and a model card.

    Args:
        dst: absent or empty.
        to: form of the result.
        seed: of what dare_ties drops; each tensor and model has its own stream, whatever the shards.
        max_shard_size, workers, progress: see `WriteOptions`.

    Raises:
        CheckpointError, WeightsError: a parent cannot be read as stated; parents differ in shape or
            tokenizer; as `write_model` says.
    """
    refuse_unless_empty(dst)
    with ThreadPoolExecutor(1) as hasher:
        source = _Merged(config, seed, hasher)
        options = WriteOptions(
            kind=to,
            dtype=source.dtype() if config.dtype is None else dtype_named(config.dtype),
            max_shard_size=max_shard_size,
            verify=False,  # what is to be compared with would have to be merged again
            workers=workers,
            progress=progress,
        )
        source.out = options.dtype
        text = dump_yaml(
            config.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
        )
        identity = {"merge": text, "seed": seed, "parents": [state_of(parent) for parent in source.parents]}

        def about(directory: Path) -> dict[str, Any]:
            prints = source.fingerprints()
            parents = [
                {"model": str(parent.directory), "fingerprint": print_}
                for parent, print_ in zip(source.parents, prints)
            ]
            (directory / CARD).write_text(_card(config, text, source.parents, prints), encoding="utf-8")
            return {"merge": text, "seed": seed, "parents": parents}

        return write_model(source, dst, options, identity=identity, about=about)


class _Merged:
    """The merged model, computed when it is asked for; parents are hashed while the arithmetic runs.

    Attributes:
        out: dtype of what is computed; to be set before it is.
        parents: the base first, where there is one, then the others in their order.
    """

    kind = "hf"

    def __init__(self, config: MergeConfig, seed: int, hasher: ThreadPoolExecutor) -> None:
        self._config, self._seed, self._hasher = config, seed, hasher
        base = [] if config.base_model is None else [config.base_model]
        self.parents = [open_source(path) for path in (*base, *(entry.model for entry in config.others))]
        first = self.parents[0]
        self.directory, self.assets, self.arch = first.directory, first.assets, first.arch
        self.rules = rules_for(self.arch)
        self.files = first.files
        self.expected: Mapping[str, Digest] = {}
        self.out = torch.float32
        for other in self.parents[1:]:
            _refuse_unlike(first, other)
        self._rule_of = {name: rule for rule in self.rules for name in rule.hf}
        self._digests: list[dict[str, Future[Digest]]] = [{} for _ in self.parents]

    def dtype(self) -> torch.dtype:
        dtypes = {parent.dtype(): parent.directory for parent in self.parents}
        if len(dtypes) > 1:
            found = ", ".join(f"{path} is {dtype}" for dtype, path in dtypes.items())
            raise WeightsError(f"the parents are of several dtypes: {found}; set dtype in the merge file")
        return next(iter(dtypes))

    def nbytes(self, rule: Rule) -> int:
        return math.prod(rule.native_shape) * self.out.itemsize

    def tensors(self, rule: Rule) -> Mapping[str, Views]:
        return {name: self._blocks(name, rule) for name in rule.hf}

    stored = tensors

    def native(self, rule: Rule) -> Views:
        return rule.parts(self.read)

    def read(self, name: str) -> Tensor:
        rule = self._rule_of[name]
        whole = torch.empty(rule.shapes[name], dtype=self.out)
        for left, right in in_blocks([whole], self._blocks(name, rule)):
            left.copy_(right)
        return whole

    def check(self, rule: Rule) -> None:
        for parent in self.parents:
            parent.check(rule)

    def own(self, block: Tensor) -> Tensor:
        return block  # it has been computed

    def release(self) -> None:
        for parent in self.parents:
            parent.release()

    def fingerprints(self) -> list[str]:
        """One for each parent: of its manifest where it has one, else of its tensors by Hugging Face name."""
        for rule in self.rules:  # those that an earlier run had merged
            for name in rule.hf:
                self._hash(name, rule, [parent.tensors(rule)[name] for parent in self.parents])
            self.release()
        return [
            fingerprint(parent.expected or {name: future.result() for name, future in digests.items()})
            for parent, digests in zip(self.parents, self._digests)
        ]

    def _hash(self, name: str, rule: Rule, tensors: Sequence[Views]) -> list[Future[Digest]]:
        """Starts to hash a tensor of those parents whose manifest has none, unless it has been hashed."""
        started = []
        for parent, parts, digests in zip(self.parents, tensors, self._digests):
            if name not in digests and not parent.expected:
                digests[name] = self._hasher.submit(digest, rule.shapes[name], parts, parent)
                started.append(digests[name])
        return started

    def _blocks(self, name: str, rule: Rule) -> Iterator[Tensor]:
        parts = [list(parent.tensors(rule)[name]) for parent in self.parents]
        started = self._hash(name, rule, parts)
        yield from self._merge(name, [views[0] if len(views) == 1 else torch.cat(views) for views in parts])
        for future in started:
            future.result()

    def _merge(self, name: str, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        config, common = self._config, self._config.parameters
        base, others, out = tensors[0], tensors[1:], self.out
        shared: dict[str, Any] = {"scale": common.scale, "normalize": config.normalize, "out": out}
        run: dict[str, Callable[[], Iterator[Tensor]]] = {
            "linear": lambda: methods.linear(tensors, config.weights, normalize=config.normalize, out=out),
            "task_arithmetic": lambda: methods.task_arithmetic(base, others, config.weights, **shared),
            "ties": lambda: methods.ties(base, others, config.weights, densities=config.densities, **shared),
            "dare_ties": lambda: methods.dare_ties(
                base,
                others,
                config.weights,
                densities=config.densities,
                seeds=[_seed(self._seed, name, i) for i in range(len(others))],
                **shared,
            ),
            "model_stock": lambda: methods.model_stock(base, others, filter_wise=common.filter_wise, out=out),
            "slerp": lambda: methods.slerp(base, others[0], t=_first(common.t, 0.0), out=out),
        }
        return run[config.merge_method]()


def _seed(seed: int, name: str, model: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {model} {name}".encode()).digest()[:7], "big")


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _refuse_unlike(left: ModelSource, right: ModelSource) -> None:
    shapes = [
        {name: shape for rule in source.rules for name, shape in zip(rule.hf, rule.hf_shapes)}
        for source in (left, right)
    ]
    for name in shapes[0] | shapes[1]:
        ours, theirs = (shape.get(name, "none") for shape in shapes)
        if ours != theirs:
            raise WeightsError(
                f"{name}: shape {ours} in {left.directory}, {theirs} in {right.directory}; "
                "only models of one shape can be merged"
            )
    unlike = [
        key
        for key, value in vars(left.arch).items()
        if key not in ("dtype", "max_position_embeddings") and getattr(right.arch, key) != value
    ]
    if unlike:
        raise WeightsError(
            f"{left.directory} and {right.directory} differ in {', '.join(unlike)} of config.json; "
            "only models of one architecture can be merged"
        )
    ours_of, theirs_of = vocabulary(left.assets), vocabulary(right.assets)
    if ours_of is not None and theirs_of is not None and ours_of != theirs_of:
        raise WeightsError(
            f"{left.directory} and {right.directory} have different tokenizers: one token would mean two things; "
            "merge models of one tokenizer"
        )


def _card(config: MergeConfig, text: str, parents: Sequence[ModelSource], prints: Sequence[str]) -> str:
    rows = "".join(
        f"| `{parent.directory.name}` | `{print_[:16]}` |\n" for parent, print_ in zip(parents, prints)
    )
    base = f", base `{config.base_model.name}`" if config.base_model is not None else ""
    return (
        "---\nlibrary_name: transformers\ntags:\n- merge\n---\n"
        f"# Merged model\n\nMerged with `{config.merge_method}`{base} by Paralign {__version__}.\n\n"
        f"| model | fingerprint |\n|---|---|\n{rows}\n"
        f"The tensors' hashes are in `{MANIFEST}`.\n\n```yaml\n{text}```\n"
    )
