"""Loss curves of runs as a picture, from their metrics.jsonl. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paralign.models.errors import ParalignError

from .metrics import read_metrics


def plot_runs(run_dirs: Sequence[Path], out_png: Path) -> None:
    """Draws training loss and every validation loss over steps, one colour for each run.

    Raises ParalignError where a run has no metrics, or none has a loss.
    """
    from matplotlib.figure import Figure  # half a second, and only here; no window system is touched

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = dict(zip(("training", "validation"), figure.subplots(1, 2), strict=True))
    markers = "os^dvx*"
    for i, run_dir in enumerate(run_dirs):
        lines = read_metrics(run_dir)
        names = dict.fromkeys(name for line in lines for name in line)
        sets = [name for name in names if name.startswith("validation/") and name.endswith("/loss")]
        for j, name in enumerate((*(["loss"] if "loss" in names else []), *sets)):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            style = {"marker": markers[j % len(markers)], "markersize": 4} if name != "loss" else {}
            label = run_dir.name if name == "loss" else f"{run_dir.name} {name.split('/')[1]}"
            panel = panels["training" if name == "loss" else "validation"]
            panel.plot(*zip(*points, strict=True), color=f"C{i}", linewidth=1.2, label=label, **style)
    if not any(panel.lines for panel in panels.values()):
        raise ParalignError(
            f"{', '.join(map(str, run_dirs))}: metrics.jsonl holds no loss yet; let a step run"
        )
    for title, panel in panels.items():
        panel.set(title=f"{title} loss", xlabel="step", ylabel="loss per token (nats)")
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
        if panel.lines:
            panel.legend(fontsize="small")
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=150)
