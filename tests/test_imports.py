"""The house's one direction of imports, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from paralign.engine.objectives import OBJECTIVES
from paralign.tools.house import imports_of, room_of

ROOT = Path(__file__).resolve().parents[1]

# Lower floors first: a room may import rooms of lower floors only.
FLOORS = [
    {"files", "processes"},
    {"batch", "config", "kernels"},
    {"backends", "data", "objectives", "observe", "parallel"},
    {"checkpoint"},
    {"training"},
    {"columns"},
    {"rollout"},
    {"run"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", _sources("models"), ids=str)
def test_models_import_nothing_of_the_engine(path: Path) -> None:
    assert not [
        name for name in imports_of(path, ROOT) if name.startswith(("paralign.engine", "paralign.tools"))
    ]


@pytest.mark.parametrize("package", ["models", "engine", "tools"])
def test_megatron_has_one_door(package: str) -> None:
    doors = {
        path.name
        for path in _sources(package)
        for name in imports_of(path, ROOT)
        if name.startswith("megatron")
    }
    assert doors <= {"mcore.py"}


def test_the_door_to_megatron_has_no_name_that_nobody_uses() -> None:
    door = ROOT / "models/mcore.py"
    nodes = list(ast.walk(ast.parse(door.read_text(encoding="utf-8"))))
    used_here = {node.id for node in nodes if isinstance(node, ast.Name)}
    named = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron")
        for alias in node.names
    }
    asked_for = {
        name.rpartition(".")[2]
        for package in ("models", "engine")
        for path in _sources(package)
        for name in imports_of(path, ROOT)
        if name.startswith("paralign.models.mcore.")
    }
    assert named - used_here <= asked_for


@pytest.mark.parametrize("path", _sources("engine"), ids=str)
def test_engine_imports_downwards(path: Path) -> None:
    parts = path.relative_to(ROOT / "engine").with_suffix("").parts
    here = parts[0]
    if here == "__init__":
        return
    assert here in FLOOR_OF, f"{here}: a new room; give it a floor"
    for name in imports_of(path, ROOT):
        assert not name.startswith("paralign.tools"), name
        room = room_of(name)
        if room and room != here:
            assert FLOOR_OF[room] < FLOOR_OF[here], f"{here} imports {name}"


def test_an_objective_is_known_by_name_in_its_own_room_only() -> None:
    named = tuple(f"paralign.engine.objectives.{name}" for name in OBJECTIVES)
    elsewhere = [path for path in _sources("engine") if path.parent.name != "objectives"]
    assert [str(path) for path in elsewhere if any(n.startswith(named) for n in imports_of(path, ROOT))] == []


def test_checking_a_recipe_starts_at_once() -> None:
    """Neither the command line nor what checks, converts and inspects costs megatron-core's five seconds."""
    code = (
        "import sys; import paralign.engine.cli, paralign.engine.run.check, paralign.engine.checkpoint.convert; "
        "sys.exit(any(name.split('.')[0] == 'megatron' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
