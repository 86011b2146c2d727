"""Ranks live and die together; the environment says which rank this is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paralign.engine.processes.launch import RankEnv, first_host, rank_environment, run_local
from paralign.models.errors import TrainingError

RANK = """\
import os, signal, sys, time
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))  # as a rank that can hear them
rank = int(os.environ["RANK"])
mode = sys.argv[2]
open(f"{sys.argv[1]}.{rank}", "w").write(" ".join([str(os.getpid()), *(os.environ[name] for name in (
    "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"))]))
print(f"words of {rank}", file=sys.stderr, flush=True)
print(f"output of {rank}", flush=True)
while not all(os.path.exists(f"{sys.argv[1]}.{other}") for other in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)
if mode == "fail" and rank == 1:
    sys.exit(7)
if mode == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode != "finish":
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(f"{sys.argv[1]}.deaf{rank}", "w")
    if mode == "deaf" and rank == 1:
        while not os.path.exists(f"{sys.argv[1]}.deaf0"):
            time.sleep(0.01)
        sys.exit(7)
    time.sleep(60)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that a rank runs instead of training; its first argument is where it leaves its marks."""
    (tmp_path / "stand_in_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stand_in_rank"


def pids(mark: Path, count: int) -> list[int]:
    """Waits until every rank has left its mark."""
    deadline = time.monotonic() + 20
    paths = [Path(f"{mark}.{rank}") for rank in range(count)]
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, "ranks did not start"
        time.sleep(0.01)
    return [int(path.read_text().split()[0]) for path in paths]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(found: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(map(alive, found)):
        assert time.monotonic() < deadline, "ranks were left behind"
        time.sleep(0.02)


def test_ranks_get_their_variables_and_only_rank_0_is_heard(
    stand_in: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_local(tmp_path / "mark", ["finish"], 3, module=stand_in) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    for rank in range(3):
        seen = Path(f"{tmp_path / 'mark'}.{rank}").read_text().split()[1:]
        assert seen == [str(rank), "3", "3", "127.0.0.1", str(threads)]
    heard = capfd.readouterr()
    assert heard.out == "output of 0\n"
    assert sorted(heard.err.splitlines()) == ["[rank 1] words of 1", "[rank 2] words of 2", "words of 0"]


@pytest.mark.parametrize(("mode", "code"), [("fail", 7), ("killed", 137)])
def test_a_failing_rank_ends_the_others(
    stand_in: str, tmp_path: Path, mode: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert run_local(tmp_path / "mark", [mode], 3, module=stand_in) == code
    assert time.monotonic() - began < 10
    assert "rank 1" in capfd.readouterr().err
    wait_until_gone(pids(tmp_path / "mark", 3))


def test_ranks_deaf_to_sigterm_are_killed(stand_in: str, tmp_path: Path) -> None:
    assert run_local(tmp_path / "mark", ["deaf"], 2, module=stand_in, grace_seconds=0.3) == 7
    wait_until_gone(pids(tmp_path / "mark", 2))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_ranks_do_not_outlive_their_parent(
    stand_in: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    program = (
        "import sys; from pathlib import Path; from paralign.engine.processes.launch import run_local\n"
        f"sys.exit(run_local(Path({str(tmp_path / 'mark')!r}), ['wait'], 2, module={stand_in!r}))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ranks = pids(tmp_path / "mark", 2)
    assert all(map(alive, ranks))
    parent.send_signal(number)
    assert parent.wait(10) == code
    wait_until_gone(ranks)


def test_handlers_of_signals_are_put_back(stand_in: str, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_local(tmp_path / "mark", ["finish"], 1, module=stand_in)
    assert signal.getsignal(signal.SIGTERM) is before


def test_torchruns_variables_are_read() -> None:
    torchrun = {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "n0",
        "MASTER_PORT": "29500",
    }
    assert rank_environment(torchrun) == RankEnv(9, 1, 16, "n0:29500")


SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_ID": "1000007",
    "SLURM_JOB_NODELIST": "gpu[003-005,9]",
}


def test_sruns_variables_are_read() -> None:
    assert rank_environment(SRUN) == RankEnv(9, 1, 16, f"gpu003:{15000 + 1000007 % 15000}")


def test_a_batch_script_is_not_a_rank() -> None:
    batch = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert rank_environment(batch).world_size == 1


def test_a_single_process_is_rank_0_of_1() -> None:
    env = rank_environment({})
    assert (env.rank, env.local_rank, env.world_size) == (0, 0, 1)
    assert env.master.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1"}, "environment variable MASTER_PORT: not set"),
        ({"RANK": "x", "MASTER_PORT": "1"}, 'environment variable RANK: read "x"'),
    ],
)
def test_half_an_environment_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        rank_environment(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-005,9]", "gpu003"),
        ("gpu7", "gpu7"),
        ("login,gpu[1-2]", "login"),
        ("a-b[12,14-16]-x,c3", "a-b12-x"),
        ("r[1-2]n[03-04],z", "r1n03"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
