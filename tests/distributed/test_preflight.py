"""Preflight on ranks that talk: healthy ones, and faults put into single ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.run.preflight import device, disk, examine
from paralign.models.arch import Arch

from ..tiny import config_keys
from .pool import RankPool
from .toy import make_toy, write_recipe

ROOM = 10**6


def look(rank: int, world_size: int, tp: int, pp: int, run_dir: Path, faults: str) -> list[str]:
    """Findings in words, on every rank; `faults` are of the last rank."""
    from paralign.models import arch_from_hf

    arch: Arch = arch_from_hf(config_keys())
    config = LayoutConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    layout = resolve(config, arch, world_size=world_size, global_batch_size=4, tokens_per_pack=64)
    right, patience = device.multiply, disk._PATIENCE
    disk._PATIENCE = 0.5
    if rank == world_size - 1:
        if "slow" in faults:
            untouched = device._wait

            def wait(where: Any) -> None:
                time.sleep(0.1)
                untouched(where)

            device._wait = wait  # type: ignore[assignment]
        if "wrong" in faults:
            device.multiply = lambda where: replace(right(where), digest="another")  # type: ignore[assignment]
        if "blind" in faults:
            run_dir = run_dir.with_name("not-shared")
    try:
        with open_mesh(layout, local_rank=rank, seed=0) as mesh:
            ranks, findings = examine.examine(mesh, run_dir, rank, ROOM)
            examine.table(ranks)
    finally:
        device.multiply, disk._PATIENCE = right, patience  # type: ignore[assignment]
        if "slow" in faults and rank == world_size - 1:
            device._wait = untouched  # type: ignore[assignment]
    axes = {"tp": tp, "pp": pp, "dp": world_size // tp // pp}
    assert all(set(found.links) == {axis for axis, size in axes.items() if size > 1} for found in ranks)
    assert all(link.right and link.gb_per_second > 0 for found in ranks for link in found.links.values())
    return [str(finding) for finding in findings]


def _steady(findings: list[str]) -> list[str]:
    """Without what a loaded machine causes: groups and ranks that share its cores are not equally fast."""
    return [text for text in findings if " GB/s over " not in text and " TFLOP/s, where" not in text]


SLOWLY = [pytest.param(*layout, marks=pytest.mark.slow) for layout in ((2, 2, 1), (2, 1, 1), (4, 2, 1))]


@pytest.mark.parametrize(("world_size", "tp", "pp"), [(4, 2, 2), *SLOWLY])
def test_faults_are_found_and_named(
    world_size: int, tp: int, pp: int, tmp_path: Path, ranks: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = world_size - 1
    run = lambda faults: ranks.run(world_size, look, tp, pp, tmp_path / "run", faults)  # noqa: E731
    healthy = run("")
    assert healthy == [healthy[0]] * world_size  # every rank comes to the same exit code
    assert _steady(healthy[0]) == []
    assert list((tmp_path / "run").iterdir()) == []
    [wrong] = _steady(run("wrong")[0])
    culprit = (
        f"rank {last} multiplies to another result" if world_size > 2 else "ranks 0, 1 multiply the same"
    )
    assert culprit in wrong
    both = run("blind, slow")[0]
    assert any(f": rank {last} multiplies at " in text for text in both)
    [blind] = _steady(both)
    assert f"rank {last} and rank 0 do not see each other's files in run_dir" in blind
    assert not list(tmp_path.glob("*/.preflight*"))


@pytest.mark.slow
def test_the_command_says_what_is_bad_and_exits_with_2(tmp_path: Path) -> None:
    make_toy(tmp_path, n_chats=10)
    (tmp_path / "closed").write_text("")
    recipe = write_recipe(tmp_path, "run", {"tensor_model_parallel_size": 2})
    command = [sys.executable, "-m", "paralign.engine.cli", "preflight", str(recipe)]
    good = subprocess.run([*command, "--nproc", "2"], capture_output=True, text=True, timeout=120)
    assert "1 nodes, 2 ranks" in good.stdout, good.stderr
    bad = subprocess.run(
        [*command, f"run_dir={tmp_path}/closed"], capture_output=True, text=True, timeout=120
    )
    assert bad.returncode == 2
    assert "cannot write run_dir: " in bad.stdout
    assert "a file stands where a directory is expected" in bad.stdout
    assert "Traceback" not in bad.stderr
