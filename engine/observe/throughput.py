"""How fast a run is: tokens and FLOPs by the second, from counts that each step tells; the share of the peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense bf16 FLOP/s by NVIDIA's data sheets; the first name found in the device's name counts.
_PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known GPU; None for others and for the CPU, where mfu is left out."""
    if device.type != "cuda":
        return None
    from torch.cuda import get_device_name

    return peak_flops_of(get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """`peak_flops` by the name that the driver gives the GPU."""
    return next((flops for known, flops in _PEAK_FLOPS.items() if known in name), None)


class Throughput:
    """Tokens and FLOPs over wall time. The first step, which allocates and compiles, is left out."""

    def __init__(
        self, *, world_size: int, peak: float | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._world_size, self._peak, self._clock = world_size, peak, clock
        self._since: float | None = None
        self._tokens = self._flops = 0.0

    def step_done(self, n_tokens: int, flops: float) -> None:
        """Counts a step: its real tokens and model FLOPs over all GPUs."""
        if self._since is None:
            self._since = self._clock()
            return
        self._tokens += n_tokens
        self._flops += flops

    def read(self) -> dict[str, float]:
        """The metrics since the last reading; empty if there was no step but the first."""
        if self._since is None or not self._tokens:
            return {}
        now = self._clock()
        seconds, per_gpu = now - self._since, self._flops / (now - self._since) / self._world_size
        metrics = {"tokens_per_second": self._tokens / seconds, "tflops_per_gpu": per_gpu / 1e12}
        if self._peak:
            metrics["mfu"] = per_gpu / self._peak
        self._since, self._tokens, self._flops = now, 0.0, 0.0
        return metrics

    def pause(self) -> Callable[[], None]:
        """Stops the clock, for evaluation or saving; call the result to go on."""
        stopped = self._clock()

        def go_on() -> None:
            if self._since is not None:
                self._since += self._clock() - stopped

        return go_on
