"""A trace of a few steps by torch.profiler."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..files.refused import refusals_told
from .config import ProfileConfig


class Profiler:
    """Traces the steps of a recipe's `observe.profile`; without one it does nothing.

    Args:
        run_dir: traces are written to `profile/rank_00003.json` there, for Perfetto or chrome://tracing.
    """

    def __init__(
        self, config: ProfileConfig | None, run_dir: Path, *, rank: int, device: torch.device
    ) -> None:
        self._config = config
        self._path = run_dir / "profile" / f"rank_{rank:05d}.json"
        self._device = device
        self._trace: profile | None = None

    def step_begins(self, step: int) -> None:
        """Starts where the window begins, or where a run is resumed inside it."""
        config = self._config
        if config is None or self._trace is not None or not config.first <= step < config.to:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._trace = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._trace.start()

    def is_last(self, step: int) -> bool:
        """Whether the window ends behind this step."""
        return self._config is not None and step + 1 == self._config.to

    def stop(self) -> None:
        """Ends and writes a trace, if one is running."""
        if self._trace is None:
            return
        self._trace.stop()
        with refusals_told(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._trace.export_chrome_trace(str(self._path))
        self._trace = None
