"""benchmarks/first_light.py goes on past whatever fails, and every step that can runs without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .distributed import machine
from .distributed.processes import Processes

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "first_light.py"


@pytest.fixture(scope="module")
def light() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_light", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_goes_on_past_failures(light: ModuleType, tmp_path: Path) -> None:
    facts = 'import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text("[7, NaN]"); print("wrote", sys.executable)'
    half = "import sys, pathlib, time; pathlib.Path(sys.argv[-1]).write_text('[1, '); time.sleep(9)"
    sleeper = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{_sleep(tmp_path)}'])"
    small = {
        "fails": light.python("-c", "raise SystemExit('not today')"),
        "hangs": light.python("-c", sleeper),
        "missing": lambda output: ["/no/such/command"],
        "writes": light.script("-c", facts),
        "writes half": light.script("-c", half),
    }
    chosen = [light.Step(name, "", 0.05, small[name], small[name]) for name in small]
    chosen.insert(1, light.Step("needs a device", "", 1, small["fails"]))
    assert not light.first_light(chosen, tmp_path, gpus=0)

    (path,) = tmp_path.glob("first_light_*.json")
    found = json.loads(path.read_text())
    assert "no figure here counts" in found["note"]
    outcomes = {step["name"]: step for step in found["steps"]}
    assert [step["status"] for step in found["steps"]] == [
        "failed: exit code 1",
        "needs 1 GPU(s), here are 0",
        "failed: not done after 0.05 minutes",
        "failed: [Errno 2] No such file or directory: '/no/such/command'",
        "passed",
        "failed: not done after 0.05 minutes",
    ]
    assert outcomes["fails"]["printed"] == "not today"
    assert outcomes["writes"]["facts"] == [7, "NaN"]  # JSON that others can read, too
    assert outcomes["writes half"]["facts"] is None
    assert outcomes["writes"]["printed"] == "wrote python"  # not where it lies on this machine
    page = path.with_suffix(".md").read_text()
    assert "| hangs |  | failed: not done after 0.05 minutes |" in page
    time.sleep(1.2)  # also until the next second, for the names of the files
    assert not (tmp_path / "outlived").exists()  # what the step started has ended with it

    light.first_light(chosen[:1], tmp_path, gpus=0)
    assert len(list(tmp_path.glob("first_light_*.json"))) == 2  # nothing is written over


def test_a_step_ends_with_what_started_it(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    sleeper = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(60)"
    code = f"from first_light import *; step = python('-c', {sleeper!r}); run(Step('', '', 1, step, step), 0)"
    with Processes(tmp_path / "log") as processes:
        process = processes.start(
            [sys.executable, "-c", code], PYTHONPATH=os.pathsep.join([str(SCRIPT.parent), *sys.path])
        )
        processes.wait_until(begun.exists)
        process.kill()
        process.wait()
        assert processes.left() == []


def test_a_machine_without_git(light: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert light.machine(gpus=0)["commit"] == ""


def test_kernels_are_built_for_this_gpu(light: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that they can be built for takes longer, and an nvcc that knows the newest of them."""
    monkeypatch.setattr(light.torch.cuda, "get_device_capability", lambda: (9, 0))
    (build,) = (step for step in light.steps("8b") if step.name == "build")
    assert build.command(Path("facts.json"))[-4:] == ["kernels", "build", "--arch", "sm_90"]


def test_kernels_that_a_gpu_refuses_fail_a_step(light: ModuleType) -> None:
    """And torch in their place does not on a machine without one."""
    (kernels,) = (step for step in light.steps("8b") if step.name == "kernels")
    assert kernels.command(Path())[-2:] == ["kernels", "--required"]
    assert kernels.small(Path())[-1] == "kernels"


def _sleep(directory: Path) -> str:
    return f'import time; time.sleep(4); open("{directory}/outlived", "w")'


def test_a_step_of_several_gpus_waits_for_them(light: ModuleType, tmp_path: Path) -> None:
    step = light.Step("ranks", "", 1, light.python("-c", ""), light.python("-c", ""), gpus=2)
    assert [light.run(step, gpus).status for gpus in (0, 1, 2)] == [
        "passed",
        "needs 2 GPU(s), here are 1",
        "passed",
    ]


def test_a_run_that_fails_leaves_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is infinite, and no number of JSON."""
    monkeypatch.setattr(machine, "make_toy", lambda directory: None)
    runs = machine.Machine(tmp_path, 2, tmp_path / "machine.json")

    def fails() -> Any:
        raise AssertionError("exit code 1")

    off = runs._hold("one rank, bf16", fails, {}, None)
    runs._hold("TP2, bf16", lambda: ({0: 1.0}, 2.5), {0: 1.0}, 3 * off)
    text = (tmp_path / "machine.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)["runs"]
    assert [(run["passed"], run["error"], run["bound"]) for run in found] == [
        (False, None, None),
        (True, 0.0, None),
    ]


@pytest.mark.slow
def test_every_step_runs_without_a_gpu(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(tmp_path)], capture_output=True, text=True
    )
    (path,) = tmp_path.glob("first_light_*.json")
    steps = {step["name"]: step for step in json.loads(path.read_text())["steps"]}
    assert ended.returncode == 0, steps
    assert {name for name, step in steps.items() if step["status"] == "passed"} == {
        *("kernels", "waits", "memory", "kernel times", "step times", "ranks")
    }
    assert all(run["passed"] for run in steps["ranks"]["facts"]["runs"])
