"""The first minutes on a GPU, in order: what is built, what agrees, what waits, what it takes, how fast it is.

    python benchmarks/first_light.py [--geometry 8b|70b] [--only NAME ...] [--output benchmarks/results]

Every step is a command of its own, with a time limit; the next one runs whatever became of it. Writes
`first_light_TIME.json` and a page `first_light_TIME.md` after each step; TIME is that of the start, so that a second
run does not write over the first. The exit code is 1 if a step failed.

Without a GPU, steps that need one say so, and the others run small to show that they work: then nothing is written to
`benchmarks/results` unless `--output` says so, and no figure counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from paralign.engine.processes.child import die_with_parent

ROOT = Path(__file__).parents[1]
LINES_SHOWN = 60
Command = Callable[[Path], list[str]]  # from where it is to write its JSON


@dataclass(frozen=True)
class Step:
    """A command and what it answers.

    Attributes:
        command: arguments for Python, or a whole command if the first is no option and no script.
        small: the same without a GPU; None where there is nothing to show then.
        gpus: that it needs at least, if there are any.
    """

    name: str
    asks: str
    minutes: float
    command: Command
    small: Command | None = None
    gpus: int = 1


@dataclass
class Outcome:
    """What became of a step; `facts` is the JSON that its command wrote, `printed` the end of what it said."""

    name: str
    asks: str
    status: str
    seconds: float = 0.0
    command: str = ""
    facts: Any = None
    printed: str = ""


def python(*arguments: str) -> Command:
    """A command of this Python that writes no JSON."""
    return lambda output: [sys.executable, *arguments]


def script(*arguments: str) -> Command:
    """A command of this Python that takes `--output`."""
    return lambda output: [sys.executable, *arguments, "--output", str(output)]


def architecture() -> str:
    """Of the first GPU: an nvcc that knows this one may be too old for the newest that kernels are built for."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def steps(geometry: str) -> list[Step]:
    """The first ten minutes on one GPU, then what takes several."""
    pytest = ("-m", "pytest", "-m", "gpu", "--timeout=900")
    paralign = ("-m", "paralign.engine.cli")
    of = f"--geometry={geometry}"
    return [
        Step("driver", "which device and driver is it?", 1, lambda output: ["nvidia-smi"]),
        Step(
            *("build", "does nvcc build the kernels for this GPU?", 10),
            lambda output: [sys.executable, *paralign, "kernels", "build", "--arch", architecture()],
        ),
        Step(
            *("kernels", "which run, and do they agree with their definitions?", 3),
            python(*paralign, "kernels", "--required"),
            python(*paralign, "kernels"),
        ),
        Step(
            *("kernel tests", "does every kernel, and attention, agree with a reference?", 15),
            python(*pytest, "tests/csrc", "tests/engine/kernels", "tests/models"),
        ),
        Step(
            *("a run", "does a run train, stop and resume?", 15),
            python(*pytest, "tests/distributed/test_gpu.py"),
        ),
        Step(
            *("waits", "does the host wait for the device within a step?", 5),
            script("benchmarks/waits.py", of),
            script("benchmarks/waits.py"),
        ),
        Step(
            *("memory", "does a step take what was predicted?", 10),
            script("benchmarks/memory.py", of),
            script("benchmarks/memory.py"),
        ),
        Step(
            *("kernel times", "what share of the bandwidth does each kernel reach?", 15),
            script("benchmarks/kernels.py"),
            script("benchmarks/kernels.py", "--tiny", "--repeats=1"),
        ),
        Step(
            *("step times", "how fast is a step, beside other trainers, and where does its time go?", 25),
            script("benchmarks/gpu_step.py", of, "--steps=4"),
            script("benchmarks/gpu_step.py", "--steps=1"),
        ),
        Step(
            *("ranks", "are losses the same at every layout, and after a kill?", 30),
            *[script("-m", "tests.distributed.machine")] * 2,
            gpus=2,
        ),
    ]


def run(step: Step, gpus: int) -> Outcome:
    """Run a step to its end or its time limit; what it started ends with it."""
    command = step.command if gpus >= step.gpus else None if gpus else step.small
    if command is None:
        return Outcome(step.name, step.asks, f"needs {step.gpus} GPU(s), here are {gpus}")
    with tempfile.TemporaryDirectory() as directory:
        output, log = Path(directory, "facts.json"), Path(directory, "log")
        arguments, began = command(output), time.monotonic()
        shown = " ".join(arguments).replace(str(output), "FACTS.json")
        outcome = Outcome(step.name, step.asks, "", command=_without_places(shown))
        try:
            with log.open("wb") as said:
                process = subprocess.Popen(
                    arguments,
                    stdout=said,
                    stderr=said,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONWARNINGS": "ignore"},
                    start_new_session=True,
                    preexec_fn=die_with_parent,  # where this one is killed, or its terminal goes
                )
            try:
                code = process.wait(60 * step.minutes)
                outcome.status = "passed" if code == 0 else f"failed: exit code {code}"
            except subprocess.TimeoutExpired:
                outcome.status = f"failed: not done after {step.minutes:g} minutes"
            finally:
                _end(process)
        except OSError as error:
            outcome.status = f"failed: {error}"
        outcome.seconds = round(time.monotonic() - began, 1)
        lines = _without_places(log.read_text(errors="replace")).splitlines()
        outcome.printed = "\n".join(lines[-LINES_SHOWN:])
        with suppress(OSError, ValueError):  # none, or half of it, from a command that was ended
            outcome.facts = json.loads(output.read_text(), parse_constant=str)  # NaN is no JSON
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _without_places(text: str) -> str:
    """A page goes into the repository: where things lie on this machine does not."""
    for place, name in ((sys.executable, "python"), (f"{ROOT}/", ""), (sys.prefix, "ENVIRONMENT")):
        text = text.replace(place, name)
    return text


def machine(gpus: int) -> dict[str, Any]:
    """What a figure depends on."""
    commit = ""
    with suppress(OSError):  # no git here
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "devices": [torch.cuda.get_device_name(i) for i in range(gpus)],
        "cores": os.cpu_count(),
        "commit": commit,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "python": platform.python_version(),
    }


def page(date: str, about: Mapping[str, Any], note: str, outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown: a table, then what each command said last."""
    lines = [f"# First light, {date}", ""]
    lines += [f"**{note}**", ""] * bool(note)
    lines += [", ".join(f"{name} {value}" for name, value in about.items()), ""]
    lines += ["| step | asks | status | seconds |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.asks} | {o.status} | {o.seconds} |" for o in outcomes]
    for outcome in outcomes:
        if outcome.printed:
            lines += ["", f"## {outcome.name}", "", f"`{outcome.command}`", "", "```text"]
            lines += [outcome.printed.replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def first_light(chosen: Sequence[Step], output: Path, gpus: int) -> bool:
    """Run the steps in order; whether none failed. The files are whole after each step."""
    now, about = datetime.datetime.now(), machine(gpus)
    date, files = now.date().isoformat(), output / f"first_light_{now:%Y-%m-%d_%H%M%S}"
    note = "" if gpus else "no GPU at hand: small sizes on the CPU; no figure here counts"
    output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for step in chosen:
        print(f"{step.name}: {step.asks}", flush=True)
        outcomes.append(run(step, gpus))
        print(f"  {outcomes[-1].status}, {outcomes[-1].seconds} s", flush=True)
        facts = {"date": date, "note": note, "machine": about, "steps": [asdict(o) for o in outcomes]}
        files.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
        files.with_suffix(".md").write_text(page(date, about, note, outcomes))
    return not any(outcome.status.startswith("failed") for outcome in outcomes)


def main() -> None:
    gpus = torch.cuda.device_count()
    results = ROOT / ("benchmarks/results" if gpus else "runs/first_light")
    parser = argparse.ArgumentParser(description="The first minutes on a GPU, one command.")
    parser.add_argument("--geometry", choices=["8b", "70b"], default="8b")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[step.name for step in steps("8b")])
    parser.add_argument("--output", type=Path, default=results)
    arguments = parser.parse_args()
    chosen = [s for s in steps(arguments.geometry) if not arguments.only or s.name in arguments.only]
    whole = first_light(chosen, arguments.output, gpus)
    print(f"written to {arguments.output}")
    raise SystemExit(not whole)


if __name__ == "__main__":
    main()
