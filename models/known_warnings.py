"""What megatron-core warns of in every run, and what is left out of it: any other warning is shown, once a place."""

import warnings

_OF_OURS = (  # what the start-up block, and processes/variables.py, say once
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
)
_OF_ITS_OWN = (
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    "`torch.distributed.* is deprecated",
    "`load_state_dict` is deprecated",
    "MimoModelConfig is experimental",
    "torch.distributed is disabled, unavailable or uninitialized",  # 0.19 reads what is no tensor on each rank
    "The argument order of load has been changed",  # the same
    r"barrier\(\): using the device under current context",  # the right one: mesh.py has set it
)


def ignore() -> None:
    """From here on in this process, or to the end of a `warnings.catch_warnings()`."""
    for beginning in (*_OF_OURS, *_OF_ITS_OWN):
        warnings.filterwarnings("ignore", beginning)
