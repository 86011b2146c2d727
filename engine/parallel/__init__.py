"""Degrees of parallelism as arithmetic (layout), and the process groups of a run (mesh)."""
