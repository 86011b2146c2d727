"""Throughput over wall time, by a clock of the test's own."""

from __future__ import annotations

import pytest
import torch

from paralign.engine.observe.throughput import Throughput, peak_flops, peak_flops_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_first_step_is_left_out() -> None:
    clock = Clock()
    throughput = Throughput(world_size=4, peak=100e12, clock=clock)
    clock.now = 30.0
    throughput.step_done(1000, 1e15)
    assert throughput.read() == {}
    for clock.now in (31.0, 32.0):
        throughput.step_done(1000, 100e12)
    assert throughput.read() == pytest.approx({"tokens_per_second": 1000, "tflops_per_gpu": 25, "mfu": 0.25})


def test_each_reading_covers_the_time_since_the_last_and_pauses_do_not_count() -> None:
    clock = Clock()
    throughput = Throughput(world_size=1, peak=None, clock=clock)
    throughput.step_done(7, 1.0)
    clock.now = 1.0
    throughput.step_done(10, 1.0)
    throughput.read()
    go_on = throughput.pause()
    clock.now = 101.0
    go_on()
    clock.now = 103.0
    throughput.step_done(50, 1.0)
    values = throughput.read()
    assert values["tokens_per_second"] == 25.0
    assert "mfu" not in values
    assert throughput.read() == {}


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_of_known_gpus(name: str, flops: float | None) -> None:
    assert peak_flops_of(name) == flops


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
