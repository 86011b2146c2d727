"""Package build; everything it declares stands in pyproject.toml. Compiles csrc only where that was asked for.

`pip install .` builds in an isolated environment without torch and compiles nothing. With
`pip install --no-build-isolation .`, and nvcc and a CUDA torch present, the kernels are built and packed in.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    """Builds the kernels first, so that they are found among the package's files."""

    def run(self) -> None:
        if _can_compile():
            from paralign.engine.kernels.build import build

            build(progress=print)
        super().run()


def _can_compile() -> bool:
    try:
        import torch
    except ImportError:
        return False
    sys.path.insert(0, str(Path(__file__).parent / "src"))
    from paralign.engine.kernels.build import find_nvcc

    return torch.version.cuda is not None and find_nvcc() is not None


setup(cmdclass={"build_py": BuildWithKernels})
