"""How processes start and end: launch, SLURM, signals. Imports neither torch nor megatron-core."""
