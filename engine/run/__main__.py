"""A rank as torchrun and srun start it. Signals are heard before torch is imported.

torchrun --nproc_per_node 8 … -m paralign.engine.run RECIPE [--replay-step=N | --resave] [key.sub=value …]
"""

import os
import sys
from collections.abc import Sequence

from ..processes.child import die_with_parent
from ..processes.stop import Stop


def main(arguments: Sequence[str]) -> int:
    """Train as this process's rank; the exit code, as `rank.run` says."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # torchrun's agent has no other way to take its ranks with it when it is killed
    # To the end of the process: a signal while it ends must not make a failure of a run that is done.
    stop = Stop().hear()
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Logits differ in size from pack to pack, and segments of the GPU's memory that cannot grow leave gaps.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    from .rank import run  # two seconds, in which a signal may come

    return run(arguments, stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
