"""No micro-batch makes the host wait for its device: seen on the CPU by what is asked of tensors in the schedule."""

from __future__ import annotations

import inspect
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from paralign.engine.backends import ours
from paralign.engine.kernels import token_statistics
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.run.assemble import TRAIN, build_learner, build_steps, weights_to_start_from
from paralign.engine.run.check import check
from paralign.engine.run.recipe import load
from paralign.engine.training import model as training

from .fused import FUSED_IN_CHUNKS
from .pool import RankPool
from .toy import make_preferences, make_toy, write_recipe

ROOT = Path(__file__).resolve().parents[2]

# A value or a size is fetched; `lift_fresh`: what Python holds becomes a tensor, to be sent from unpinned memory.
WAITING = (
    *("_local_scalar_dense", "equal", "masked_select", "nonzero", "repeat_interleave.Tensor"),
    *("lift_fresh", "_unique", "unique"),
)
FETCHING = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.cuda}  # no operation on the CPU
# What megatron-core asks of tensors that are the host's on a GPU too: counters, the state of the host's generator.
ON_HOST = (("lift_fresh", ""), ("_local_scalar_dense", "/core/tensor_parallel/random.py"))
MEGATRON = str(Path(inspect.getfile(training.get_forward_backward_func)).parents[2])
OURS = (str(ROOT / "src"), str(ROOT / "tests"))


class _Operations(TorchDispatchMode):
    """Notes operations that wait, those inside of custom operations too."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        if function.__name__.startswith(WAITING) or _picks_by_mask(function, arguments):
            _note(self.found, function.__name__)
        if custom := _maybe_get_opdef(function):
            with self:
                return custom._init_fn(*arguments, **(options or {}))
        return function(*arguments, **(options or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        if function in FETCHING:
            _note(self.found, function.__name__)
        return function(*arguments, **(options or {}))


def _picks_by_mask(function: Any, arguments: tuple[Any, ...]) -> bool:
    """How many it picks is asked of the device; a number that is put where a mask is true is a `masked_fill`."""
    if not function.__name__.startswith(("index.", "index_put", "_index_put")):
        return False
    puts_number = len(arguments) > 2 and arguments[2].dim() == 0
    return not puts_number and any(x is not None and x.dtype is torch.bool for x in arguments[1])


def _note(found: Counter[str], what: str) -> None:
    here = ("_note", "__torch_dispatch__", "__torch_function__")
    place = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename.startswith((*OURS, MEGATRON)) and frame.name not in here
    ][-1]
    if not any(
        what.startswith(name) and place.filename.startswith(MEGATRON + file) for name, file in ON_HOST
    ):
        found[f"{what} at {place.filename}:{place.lineno}: {place.line}"] += 1


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Every schedule that runs meanwhile: what waits in it, and how often."""
    found: Counter[str] = Counter()
    schedule_of = training.get_forward_backward_func

    def get_forward_backward_func() -> Any:
        schedule = schedule_of()

        def run(**arguments: Any) -> Any:
            found["micro-batches"] += arguments["num_microbatches"]
            with _Operations(found), _Calls(found):
                return schedule(**arguments)

        return run

    with (
        mock.patch.object(training, "get_forward_backward_func", get_forward_backward_func),
        mock.patch.object(token_statistics, "_may_look", return_value=False),  # as on a GPU
    ):
        yield found


def waits_of_a_step(rank: int, world_size: int, path: Path, fused: bool) -> Counter[str]:
    """In the first step of a recipe, and in the forward passes that fill its columns."""
    report = check(load(path), world_size)
    operations = FUSED_IN_CHUNKS if fused else ours.TORCH
    with (
        open_mesh(report.layout, local_rank=rank, seed=1) as mesh,
        mock.patch.object(ours, "TORCH", operations),
        watched() as found,
    ):
        read = weights_to_start_from(report.recipe, report.arch, mesh)
        model = training.Model.open(report.arch, mesh, report.recipe.model, read)
        steps = build_steps(report, model, read)
        learner = build_learner(report, model)
        learner.gradients(steps[TRAIN].step(0))
    return found


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x[:, [0, 2]], "lift_fresh"),
        (lambda x: torch.tensor([1.0], device=x.device), "lift_fresh"),
        (lambda x: x.new_tensor(1.0), "lift_fresh"),
        (lambda x: torch.equal(x, x), "equal"),
    ],
)
def test_what_waits_is_seen(wait: Callable[[Tensor], Any], name: str) -> None:
    found: Counter[str] = Counter()
    with _Operations(found), _Calls(found):
        wait(torch.ones(2, 3))
    (seen,) = found
    assert seen.startswith(name)
    assert Path(__file__).name in seen


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("waits")
    make_toy(directory, n_chats=24)
    make_preferences(directory)
    return directory


OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "dpo, online": {"name": "dpo", "beta": 0.1, "sft_weight": 0.2, "reference": "online"},
    "dpo, cached": {"name": "dpo", "beta": 0.1},
    "reward": {"name": "reward", "alpha": 0.1, "score_range": [1, 5], "center_rewards_coefficient": 0.1},
    "kto": {"name": "kto", "beta": 0.1, "reference": "online"},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 0.5},
    "orpo": {"name": "orpo", "beta": 0.1},
    "cpo": {"name": "cpo", "beta": 0.1},
}
ONE: tuple[int, dict[str, Any], dict[str, Any]] = 1, {}, {}
FOUR = (
    4,
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)


@pytest.mark.parametrize(
    ("objective", "at", "fused"),
    [
        *((objective, ONE, fused) for objective in OBJECTIVES for fused in (True, False)),
        ("sft", FOUR, True),
        ("dpo, online", FOUR, False),
    ],
)
def test_no_micro_batch_waits(
    objective: str, at: tuple[int, dict[str, Any], dict[str, Any]], fused: bool, toy: Path, ranks: RankPool
) -> None:
    section, (world_size, layout, recompute) = OBJECTIVES[objective], at
    files: Any = str(toy / ("labelled.jsonl" if section["name"] == "kto" else "pairs.jsonl"))
    if section["name"] == "sft":
        files = [{"path": str(toy / "chats.jsonl"), "name": name} for name in ("one", "two")]
    recipe = write_recipe(
        *(toy, "run", layout),
        objective=section,
        model={"hf": str(toy / "model"), "dtype": "bf16", **recompute},
        data__train=files,
        data__validation={},
        train__global_batch_size=2,
        train__eval_every_steps=None,
        observe__token_metrics=[] if section["name"] == "reward" else ["entropy", "mean_token_accuracy"],
    )
    for found in ranks.run(world_size, waits_of_a_step, recipe, fused):
        assert found.pop("micro-batches") > 0
        assert not found, "\n".join(found)
