"""One rank of a run: it meets the others, checks its recipe, trains, and says how that ended."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paralign.models import known_warnings
from paralign.models.errors import ParalignError, RecipeError

from ..checkpoint.hf import arch_of
from ..files.lock import locked
from ..files.refused import told
from ..processes.launch import RankEnv, rank_environment
from ..processes.stop import EXIT_STOPPED, Stop
from ..processes.variables import check_interface, set_before_cuda
from .check import CheckReport, check
from .recipe import Recipe, load

REPLAY, RESAVE = "--replay-step=", "--resave"

if TYPE_CHECKING:
    from .trainer import Trainer


def run(arguments: Sequence[str], stop: Stop) -> int:
    """Train as this process's rank.

    Args:
        arguments: a recipe, keys to set, and perhaps `--replay-step=N` or `--resave`.

    Returns:
        The exit code: 0; 2 for an error that the user can mend; `EXIT_STOPPED` if a signal ended the run and it
        is to be started again.
    """
    env = rank_environment()
    world_store: list[Any] = []  # filled once the ranks have met
    try:
        replay_step, others = replay_step_of(arguments)
        resave, others = RESAVE in others, [other for other in others if other != RESAVE]
        if not others:
            raise RecipeError(
                "no recipe given; expected RECIPE [--replay-step=N | --resave] [key.sub=value …]"
            )
        recipe = load(Path(others[0]), others[1:])
        # Arithmetic first: a layout that cannot be must not wait for other ranks.
        layout = recipe.resolve_layout(arch_of(recipe.model.hf), env.world_size)
        check_interface(env)
        remark = set_before_cuda(env.rank, recipe.run_dir, tensor_parallel=layout.tp > 1)
        if remark and env.rank == 0:
            print(remark, file=sys.stderr, flush=True)
        whole = meet_and_train(recipe, env, world_store, stop, replay_step, resave=resave)
    except Exception as raised:
        error = told(raised)
        mendable, asked_before = isinstance(error, ParalignError), stop.asked
        text = f"error: {error}" if mendable else traceback.format_exc()
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # into torchrun's error file, if there is one
        first = _first_to_fail(env, world_store)
        stop.defer()
        if not mendable:
            # It may follow from the end of a rank that was asked to stop: whoever has started the ranks then asks
            # this one as well, and a line is enough.
            time.sleep(1)
        if stop.asked and not asked_before:
            text = f"error while others stop: {error!r}"
        if first:
            print(text, file=sys.stderr, flush=True)
        # Without waiting: other ranks may sit in a collective that this one will never join.
        sys.stdout.flush()
        os._exit(2 if mendable else 1)
    return 0 if whole else EXIT_STOPPED


def replay_step_of(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """The step of `--replay-step=N`, if given, and the other arguments."""
    found = [argument for argument in arguments if argument.startswith(REPLAY)]
    others = [argument for argument in arguments if not argument.startswith(REPLAY)]
    if not found:
        return None, others
    number = found[-1].removeprefix(REPLAY)
    if not number.isdecimal():
        raise RecipeError(f"{found[-1]}: expected the number of a step, such as {REPLAY}137")
    return int(number), others


def meet_and_train(
    recipe: Recipe,
    env: RankEnv,
    world_store: list[Any],
    stop: Stop,
    replay_step: int | None = None,
    *,
    resave: bool = False,
) -> bool:
    """Join the other ranks, check the recipe on all of them, train; see `train`."""
    known_warnings.ignore()
    from ..parallel.mesh import open_world

    env.tell_torch()
    with open_world(
        rank=env.rank,
        world_size=env.world_size,
        local_rank=env.local_rank,
        timeout_minutes=recipe.layout.distributed_timeout_minutes,
    ) as opened:
        world_store.append(opened)
        with _rank_0_first(env, opened):
            # One rank of each machine checks what is on disk: all would read it again and again.
            report = check(recipe, env.world_size, progress=env.rank == 0, verify=env.local_rank == 0)
        return train(report, stop, local_rank=env.local_rank, replay_step=replay_step, resave=resave)


def train(
    report: CheckReport,
    stop: Stop,
    *,
    local_rank: int,
    replay_step: int | None = None,
    resave: bool = False,
) -> bool:
    """Train a checked recipe in an open world, from its newest checkpoint if it has one.

    Args:
        stop: asked at each step.
        replay_step: look at this step only, and write nothing of the run's own; see replay.py.
        resave: train nothing; write the newest checkpoint again, so that any layout loads it.

    Returns:
        Whether the run came to its end.
    """
    from ..parallel.mesh import open_mesh
    from .assemble import build_trainer, write_again

    recipe = report.recipe
    if replay_step is not None and replay_step >= report.total_steps:
        raise RecipeError(f"{REPLAY}{replay_step}: the run has the steps 0 to {report.total_steps - 1}")
    if recipe.model.deterministic:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with (
        open_mesh(report.layout, local_rank=local_rank, seed=recipe.train.seed) as mesh,
        locked(recipe.run_dir) if mesh.is_main and replay_step is None else nullcontext(),
    ):
        if resave:
            directory = write_again(report, mesh)
            if mesh.is_main:
                print(f"{directory}: written again; any layout loads it", flush=True)
            mesh.barrier()
            return True
        trainer = build_trainer(report, mesh, stop, replay_step)
        if replay_step is not None:
            _replay(trainer, replay_step, recipe.run_dir)
            return True
        # A rank that is asked to stop before this leaves by itself, later all of them save together.
        mesh.barrier()
        stop.defer()
        with trainer.watch:
            whole = trainer.fit()
        if not whole and mesh.is_main:
            stop.tell()
        mesh.barrier()  # srun ends the other ranks when the first has left
        return whole


def _replay(trainer: Trainer, step: int, run_dir: Path) -> None:
    from rich.console import Console

    from ..observe.metrics import logged_step
    from .replay import replay, show

    console = Console(highlight=False, soft_wrap=True)
    is_main, first_step = trainer.learner.model.mesh.is_main, trainer.course.first_step
    if is_main:
        start = "the first weights" if first_step == 0 else f"iter_{first_step:07d}"
        console.print(f"from {start}; {step - first_step} steps to do again")
    found = replay(trainer, step)
    if is_main:
        show(found, logged_step(run_dir, step), run_dir / "replay" / f"step_{step:07d}.json", console)


@contextmanager
def _rank_0_first(env: RankEnv, world_store: Any) -> Iterator[None]:
    """Run the body on rank 0, then on the others, however long rank 0 takes: it may tokenise for an hour."""
    if env.rank > 0:
        world_store.wait(["rank 0 is ready"], timedelta(days=7))
    yield
    if env.rank == 0:
        world_store.set("rank 0 is ready", "")


def _first_to_fail(env: RankEnv, world_store: list[Any]) -> bool:
    """Whether this rank is the one to print: the first error is the cause, the others only follow from it."""
    if not world_store:
        if env.rank > 0:
            time.sleep(5)  # rank 0 may find the same; who leaves first ends the others, and it has to print
        return env.local_rank == 0  # what is wrong with a node, its first rank says
    try:
        return world_store[0].add("ranks that failed", 1) == 1
    except Exception:  # the store went with the rank that failed first
        return False
