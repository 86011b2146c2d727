"""What a run shows: console, metrics, plots."""
