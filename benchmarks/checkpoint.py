"""Times saves and loads of a training state by several ranks, beside torch's own of the same tensors.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [--nproc 4] [--tp 2] [--hidden 768] [--layers 8] [--repeats 3]

A random Llama in bf16 at tp × dp, its optimizer's state in fp32. Each repeat saves and loads in every way: ours with
`checkpoint.layout` any and same, synchronously and asynchronously; any, with the optimizer gathered and written by
megatron-core's own way; and torch's `dcp.save` and `dcp.async_save` of the tensors that a rank of ours writes, by the
same number of threads. Ours takes checksums besides, and gives a checkpoint its name at the end. After a save has
returned, and before its end is waited for, each value of the state is written once, as a step of training does: what
a child still writes is then copied by the system.

`blocked`: until the save returns. `all`: until the checkpoint is complete, the slowest rank's. `memory`: the most
that a rank and its children have in memory beyond what the rank had before (proportional set size, looked at every
20 ms). Medians of all rounds but the first, ratios to `dcp.save` and `dcp.load`, and JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from llama_directory import make_directory
from torch import Tensor

from paralign.engine.backends import backend_of
from paralign.engine.checkpoint import store
from paralign.engine.checkpoint.config import CheckpointConfig
from paralign.engine.checkpoint.hf import Assets, arch_of
from paralign.engine.checkpoint.state_bytes import state_bytes
from paralign.engine.config.model import ModelConfig
from paralign.engine.config.optimizer import OptimizerConfig
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import Mesh, open_mesh, open_world
from paralign.engine.training.build import random_weights
from paralign.engine.training.model import Model
from paralign.engine.training.optim import Optimizer
from paralign.engine.training.state import NativeCheckpoints
from paralign.engine.training.state_pieces import StateInPieces

Figures = dict[str, float]  # seconds blocked, seconds in all, bytes of memory
Way = Callable[[], Figures]
PEERS = ("dcp.save", "dcp.load")


def main() -> None:
    parser = argparse.ArgumentParser(description="Saves and loads of a training state.")
    for name, value in {
        "nproc": 4,
        "tp": 2,
        "hidden": 768,
        "layers": 8,
        "vocabulary": 16000,
        "repeats": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_directory(
            Path(folder) / "model",
            layers=arguments.layers,
            vocabulary=arguments.vocabulary,
            seed=0,
            hidden=arguments.hidden,
        )
        context = multiprocessing.get_context("fork")  # so that the ranks import nothing again
        ranks = [
            context.Process(target=_rank, args=(rank, Path(folder), arguments))
            for rank in range(arguments.nproc)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    sys.exit(max(abs(rank.exitcode or 0) for rank in ranks))


def _rank(rank: int, folder: Path, arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="megatron")
    met = dist.FileStore(str(folder / "store"), arguments.nproc)
    arch = arch_of(folder / "model")
    keys = LayoutConfig(tensor_model_parallel_size=arguments.tp, pipeline_model_parallel_size=1)
    layout = resolve(
        keys, arch, world_size=arguments.nproc, global_batch_size=arguments.nproc, tokens_per_pack=64
    )
    section = ModelConfig(hf=folder / "model", dtype="bf16")
    with (
        open_world(rank=rank, world_size=arguments.nproc, local_rank=rank, timeout_minutes=10, store=met),
        open_mesh(layout, local_rank=rank, seed=0) as mesh,
    ):
        model = Model.open(
            arch, mesh, section, random_weights(arch, seed=0, dtype=torch.bfloat16, device=mesh.device)
        )
        model.prepare_to_train()
        optimizer = Optimizer(
            model.chunks,
            OptimizerConfig(lr=1e-4, weight_decay=0.1, lr_decay_style="constant", lr_warmup_steps=0),
            layout,
            torch.bfloat16,
            fused=backend_of(section).fuses_updates,
        )
        ways = {**_ours(folder, model, optimizer), **_torchs(folder, model, optimizer)}
        found: dict[str, list[Figures]] = {name: [] for name in ways}
        for _ in range(1 + arguments.repeats):
            for name, way in ways.items():  # those that load follow the save of the same name
                found[name].append({what: mesh.largest(value) for what, value in way().items()})
        if mesh.is_main:
            _tell(found, model, arguments)


def _ours(folder: Path, model: Model, optimizer: Optimizer) -> dict[str, Way]:
    mesh, assets = model.mesh, Assets(folder / "model", folder / "model")
    state = _weights(model) | _optimizer_state(optimizer)
    ways: dict[str, Way] = {}
    for layout, in_background in (("any", False), ("any", True), ("same", False), ("same", True)):
        config = CheckpointConfig(layout=layout, async_save=in_background)  # type: ignore[arg-type]
        root = folder / f"{layout}-{in_background}"
        checkpoints = NativeCheckpoints(root, config, model, optimizer, assets=assets, recipe="")
        ways[f"{layout}, {'async' if in_background else 'sync'}"] = _save_with(mesh, checkpoints, state)
        if not in_background:
            ways[f"{layout}, load"] = _load_with(mesh, checkpoints)

    plain = NativeCheckpoints(
        folder / "plain", CheckpointConfig(async_save=True), model, optimizer, assets=assets, recipe=""
    )
    save, load = _save_with(mesh, plain, state), _load_with(mesh, plain)
    ways["any, megatron-core's gather, async"] = lambda: _in_megatrons_way(save)
    ways["any, megatron-core's gather, load"] = lambda: _in_megatrons_way(load)
    return ways


def _in_megatrons_way(way: Way) -> Figures:
    theirs = StateInPieces.__mro__[1]
    names = ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable")
    with patch.multiple(StateInPieces, **{name: getattr(theirs, name) for name in names}):
        return way()


def _save_with(mesh: Mesh, checkpoints: NativeCheckpoints, state: Mapping[str, Tensor]) -> Way:
    def save() -> Figures:
        with _watched(mesh) as figures:
            checkpoints.save(store.Progress(1, ""), lambda: None)
            figures["blocked"] = figures["clock"]()
            _touch(state)
            checkpoints.finish()
        return figures

    return save


def _load_with(mesh: Mesh, checkpoints: NativeCheckpoints) -> Way:
    def load() -> Figures:
        with _watched(mesh) as figures:
            checkpoints.load(store.directory_of(checkpoints.root, 1))
        return figures

    return load


def _torchs(folder: Path, model: Model, optimizer: Optimizer) -> dict[str, Way]:
    """The tensors under names that are equal where they are the same: torch then writes one of the copies."""
    mesh = model.mesh
    state = {f"tp{mesh.tp.rank}.{name}": weight for name, weight in _weights(model).items()}
    state |= {f"rank{mesh.rank}.{name}": values for name, values in _optimizer_state(optimizer).items()}
    group = dist.new_group(backend="gloo")
    path = folder / "torch"

    def emptied() -> Any:
        if mesh.is_main:
            shutil.rmtree(path, ignore_errors=True)
        mesh.barrier()
        return dcp.FileSystemWriter(path, thread_count=2)

    def save() -> Figures:
        writer = emptied()
        with _watched(mesh) as figures:
            dcp.save(state, storage_writer=writer, process_group=group)
            figures["blocked"] = figures["clock"]()
            _touch(state)
        return figures

    def save_in_background() -> Figures:
        writer = emptied()
        with _watched(mesh) as figures:
            future = dcp.async_save(state, storage_writer=writer, process_group=group)
            figures["blocked"] = figures["clock"]()
            _touch(state)
            future.result()
        return figures

    def load() -> Figures:
        with _watched(mesh) as figures:
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), process_group=group)
        return figures

    return {"dcp.save": save, "dcp.async_save": save_in_background, "dcp.load": load}


def _weights(model: Model) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_weights()}


def _optimizer_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """The fp32 weights and moments that this rank updates."""
    (part,) = optimizer.megatron.chained_optimizers
    found = {}
    for number, (parameter, held) in enumerate(part.optimizer.state.items()):
        found |= {f"{number}.param": parameter.detach()}
        found |= {f"{number}.{name}": held[name] for name in ("exp_avg", "exp_avg_sq")}
    return found


def _touch(state: Mapping[str, Tensor]) -> None:
    for values in state.values():
        values.mul_(1)


@contextmanager
def _watched(mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Times the body and watches the memory; `blocked` is all of it where the body does not say."""
    ended = threading.Event()
    seen = [_memory()]

    def look() -> None:
        while not ended.wait(0.02):
            seen.append(_memory())

    mesh.barrier()
    began = time.perf_counter()
    figures: dict[str, Any] = {"clock": lambda: time.perf_counter() - began}
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    yield figures
    del figures["clock"]
    figures["all"] = time.perf_counter() - began
    figures.setdefault("blocked", figures["all"])
    ended.set()
    watcher.join()
    figures["memory"] = max(seen) - seen[0]


def _memory() -> int:
    """Bytes of this process and its children; what they share is counted once."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    total = 0
    for process in (own, *children):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _tell(found: Mapping[str, list[Figures]], model: Model, arguments: argparse.Namespace) -> None:
    medians = {
        name: {what: statistics.median(figures[what] for figures in rounds[1:]) for what in rounds[0]}
        for name, rounds in found.items()
    }
    save, load = (medians[peer] for peer in PEERS)
    parameters = sum(weight.numel() for _, weight in model.named_weights())
    each = state_bytes(parameters, dp=model.mesh.dp.size, weight=2).disk
    layout = f"tp {model.mesh.tp.size} × dp {model.mesh.dp.size}"
    print(f"{layout}, {each / 1e9:.3f} GB a rank; in brackets the ratio to dcp.save or dcp.load")
    for name, figures in medians.items():
        peer = load if name.endswith("load") else save
        cells = [
            f"{what} {figures[what] / scale:6.2f}{unit} ({figures[what] / (peer[what] or 1):5.2f})"
            for what, scale, unit in (
                ("blocked", 1, " s"),
                ("all", 1, " s"),
                ("memory", each, " × its bytes"),
            )
        ]
        print(f"{name:<36}{'   '.join(cells)}")
    on_gpu = model.mesh.device.type == "cuda"
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else "no GPU",
        "note": ""
        if on_gpu
        else "ranks on a CPU under gloo: for pinned memory and NCCL no figure here counts",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "layout": layout,
        "bytes_a_rank": each,
        **{name: value for name, value in vars(arguments).items() if name != "output"},
        "results": medians,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
