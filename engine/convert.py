"""From a native checkpoint to a Hugging Face directory, tensor by tensor. Owns no format and no weight rule.

Needs no process group, no GPU and no megatron-core; holds one tensor at a time.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from paralign.models import rules_for
from paralign.models.arch import DTYPE_NAMES
from paralign.models.errors import CheckpointError, WeightsError
from paralign.models.weights import Rule, Vocabulary, bit_equal, count_parameters

from .checkpoint.hf import (
    Assets,
    HFReader,
    StageWriter,
    arch_of,
    copy_assets,
    finish_export,
    parse_size,
    shard_plan,
)

MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class Report:
    """What a conversion wrote.

    Attributes:
        tensors, parameters, files: Hugging Face tensors, their elements, safetensors files.
        tensor_bytes: bytes of the tensors.
        seconds: wall time, verification included.
        verified: every native tensor was compared, bit by bit, with what was read back.
    """

    tensors: int
    parameters: int
    files: int
    tensor_bytes: int
    seconds: float
    verified: bool


def convert(
    src: Path,
    dst: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = True,
    progress: bool = True,
) -> Report:
    """Writes the model of a native checkpoint as a Hugging Face directory.

    The work is done beside `dst`, which appears when all is written and verified.

    Args:
        src: a finished checkpoint, `…/iter_0000100`, with its `hf/` folder.
        dst: absent or empty.
        dtype: float32, bfloat16 or float16; None keeps the checkpoint's.
        max_shard_size: such as `5GB`.
        verify: read everything back and compare.
        progress: show a progress bar.

    Raises:
        CheckpointError: `src` is not a finished checkpoint, or not of the model in its `hf/config.json`.
        WeightsError: `dst` is not empty, or the written files are not what was read.
    """
    began = time.monotonic()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise WeightsError(f"{dst}: not empty; choose a directory that is empty or not there")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise WeightsError(f"dtype: read {dtype!r}; expected one of {', '.join(DTYPE_NAMES)}")
    checkpoint = _Checkpoint(src)
    rules = rules_for(arch_of(checkpoint.assets))
    stored = checkpoint.check(rules)
    target = stored if dtype is None else getattr(torch, dtype)
    plan = shard_plan([rules], dtype=target, max_shard_bytes=parse_size(max_shard_size))

    unfinished = dst.with_name(f".{dst.name}.{os.getpid()}.part")
    unfinished.mkdir(parents=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        disable=not progress,
    )
    try:
        with bar:
            writing = bar.add_task("writing", total=plan.tensor_bytes)
            writer = StageWriter(unfinished, plan, stage=0)
            for rule in rules:
                for name, tensor in rule.join([checkpoint.read(rule)]).items():
                    writer.add(name, tensor)
                    bar.advance(writing, tensor.numel() * target.itemsize)
            writer.close()
            copy_assets(
                Assets(checkpoint.assets, checkpoint.assets),
                unfinished,
                dtype=str(target).removeprefix("torch."),
            )
            finish_export(unfinished, plan)
            if verify:
                verifying = bar.add_task("verifying", total=plan.tensor_bytes)
                written = HFReader(unfinished)
                for rule in rules:
                    tensor = checkpoint.read(rule).to(target)
                    if not bit_equal(tensor, rule.slice(written.read, 0, 1)):
                        raise WeightsError(
                            f"{unfinished}: {rule.native} was not read back as written; is the disk sound?"
                        )
                    bar.advance(verifying, tensor.numel() * target.itemsize)
        os.replace(unfinished, dst)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Report(
        tensors=sum(len(rule.hf) for rule in rules),
        parameters=count_parameters(rules),
        files=len(plan.files),
        tensor_bytes=plan.tensor_bytes,
        seconds=time.monotonic() - began,
        verified=verify,
    )


class _Checkpoint:
    """The tensors of a native checkpoint by native name, whole, one at a time, on the CPU.

    Attributes:
        assets: the folder with config and tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        self.assets = directory / "hf"
        for needed in (".metadata", "hf/config.json"):
            if not (directory / needed).is_file():
                inside = sorted(path.name for path in directory.glob("iter_*"))
                remedy = f"give {directory / inside[-1]}" if inside else "did the save finish?"
                raise CheckpointError(f"{directory}: not a checkpoint, {needed} is missing; {remedy}")
        self._directory = directory
        self._reader = _Reader(directory)
        metadata = self._reader.read_metadata()
        ends: dict[str, int] = {}
        for item in metadata.storage_data.values():
            ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
        for file, end in ends.items():
            path = directory / file
            size = path.stat().st_size if path.exists() else 0
            if size < end:
                raise CheckpointError(
                    f"{path}: {size} bytes, .metadata says {end}; copy the checkpoint again"
                )
        self._stored = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def check(self, rules: tuple[Rule, ...]) -> torch.dtype:
        """Compares names, shapes and dtypes with the rules; returns the one dtype of all the tensors.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape, or dtypes are mixed.
        """
        expected = {rule.native: rule for rule in rules}
        for name, rule in expected.items():
            if name not in self._stored:
                raise CheckpointError(f"{self._directory}: lacks {name}, which hf/config.json calls for")
            found, shape = tuple(self._stored[name].size), rule.native_shape
            padded = isinstance(rule, Vocabulary) and found[0] > shape[0] and found[1:] == shape[1:]
            if found != shape and not padded:
                raise CheckpointError(
                    f"{self._directory}: {name}: found shape {found}, hf/config.json calls for {shape}"
                )
        for name in self._stored:
            if name.startswith(MODEL_PREFIXES) and name not in expected:
                raise CheckpointError(
                    f"{self._directory}: holds {name}, which hf/config.json does not call for"
                )
        dtypes = {self._stored[name].properties.dtype: name for name in expected}
        if len(dtypes) > 1:
            examples = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            raise CheckpointError(f"{self._directory}: its weights are of several dtypes: {examples}")
        return next(iter(dtypes))

    def read(self, rule: Rule) -> Tensor:
        """The whole native tensor, without the padding of the vocabulary."""
        stored = self._stored[rule.native]
        state = {rule.native: torch.empty(stored.size, dtype=stored.properties.dtype)}
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # "assuming a single process"
            dcp.load(state, storage_reader=self._reader, no_dist=True)
        return state[rule.native].narrow(0, 0, rule.native_shape[0])


class _Reader(dcp.FileSystemReader):
    """Unpickles the metadata once, not once for each tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata
