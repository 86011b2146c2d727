"""A trace of a few steps by torch.profiler. Owns the window and the files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

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
        if self._config is None or step != self._config.first:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._trace = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._trace.start()

    def step_done(self, step: int) -> Path | None:
        """Writes the trace behind the last step of the window; its path, then only."""
        if self._trace is None or self._config is None or step + 1 < self._config.to:
            return None
        return self.stop()

    def stop(self) -> Path | None:
        """Ends a trace that is running, as where the run ends inside the window."""
        if self._trace is None:
            return None
        self._trace.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._trace.export_chrome_trace(str(self._path))
        self._trace = None
        return self._path
