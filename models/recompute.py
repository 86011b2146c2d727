"""Activations that are given back after the forward pass, and computed again in time for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def free_until_backward(use: Tensor, *made: tuple[Tensor, Callable[[], Tensor]]) -> None:
    """Frees the memory of tensors, and fills it again when the gradient of `use` arrives.

    The graph stays as it is: what was computed is only stored anew, so gradients are the same to the bit.
    megatron-core's CheckpointWithoutOutput is for operations that give nothing else. It would keep the input of our
    norm beside the sum that this gives, run a backward pass within the backward pass, keep the state of generators
    that nobody draws from, and as its layers call it it needs Transformer Engine.

    Args:
        use: what the tensors were used for. Whatever keeps one of them must be backward of it, and nothing may read
            them any more in the forward pass. Without a gradient nothing is kept, and nothing is done.
        made: tensors that own their memory, each with what computes it again. They are filled in this order, so that
            one may be computed from those before it.
    """
    if not use.requires_grad:
        return
    freed = [(tensor.untyped_storage(), again) for tensor, again in made]
    for storage, _ in freed:
        storage.resize_(0)

    @torch.no_grad()
    def fill(gradient: Tensor) -> None:
        del gradient
        handle.remove()  # and with it the tensors held here: the graph lives until the last layer's pass has ended
        for storage, again in freed:
            computed = again().untyped_storage()
            storage.resize_(computed.nbytes())
            storage.copy_(computed)

    handle = use.register_hook(fill)
