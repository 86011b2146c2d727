"""A bar with bytes, speed and the time that is left, where there is a terminal, and nothing where there is none."""

import io
import re
import time

import pytest
import torch
import yaml
from rich.console import Console

from paralign.engine.checkpoint import workers
from paralign.engine.checkpoint.convert import convert
from paralign.engine.checkpoint.merge import load_merge, merge
from paralign.engine.checkpoint.verify import check_against_manifest, compare

from ...tiny import random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    random_model("llama", num_hidden_layers=1).save_pretrained(directory / "hf")
    convert(directory / "hf", directory / "native")
    return directory


def merged(model, out):
    config = out.with_suffix(".yaml")
    parents = [{"model": str(model / form)} for form in ("hf", "native")]
    config.write_text(yaml.safe_dump({"merge_method": "linear", "models": parents}))
    merge(load_merge(config), out)


WORK = {
    "convert": (lambda model, out: convert(model / "hf", out), {"writing", "verifying"}),
    "verify": (lambda model, out: check_against_manifest(model / "native"), {"verifying"}),
    "verify two": (lambda model, out: compare(model / "native", model / "hf"), {"verifying"}),
    "merge": (merged, {"writing"}),
}


@pytest.mark.parametrize("what", WORK)
def test_a_terminal_sees_bytes_speed_and_time(what, model, tmp_path, monkeypatch, capfd):
    work, tasks = WORK[what]
    work(model, tmp_path / "silent")
    assert capfd.readouterr() == ("", "")
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120)
    monkeypatch.setattr(workers, "Console", lambda stderr: console)
    work(model, tmp_path / "shown")
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue()).splitlines()[-len(tasks) :]
    for task, line in zip(sorted(tasks, reverse=True), last, strict=True):
        done = r"(\d+\.\d)/\1 kB"
        assert re.search(rf"{task} +━+ {done} +[\d.,]+ +\wB/s +0:00:00", line), line


def test_the_first_failure_stops_what_waits():
    threads, begun = torch.get_num_threads(), []

    def work(item):
        begun.append(item)
        if item == 1:
            raise ValueError("one")
        time.sleep(0.02)

    with pytest.raises(ValueError, match="one"):
        workers.over(range(100), work, 2)
    assert len(begun) < 50
    assert torch.get_num_threads() == threads
    assert workers.over(range(5), str, 3) == list("01234")
