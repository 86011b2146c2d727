"""A rank of preflight, as `paralign preflight`, torchrun and srun start it. Exit code 2 if something is bad.

torchrun --nnodes 2 --nproc_per_node 8 … -m paralign.engine.run.preflight RECIPE [key.sub=value …]
"""

import sys
from collections.abc import Sequence

from ...processes.stop import Stop


def main(arguments: Sequence[str]) -> int:
    """Check the machines as this process's rank; the exit code."""
    Stop().hear()  # a signal ends this rank at once
    from .rank import run  # two seconds

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
