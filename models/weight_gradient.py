"""Weight gradients added to fp32 buffers where they are computed.

Megatron's `gradient_accumulation_fusion` calls apex's module `fused_weight_gradient_mlp_cuda`. This offers the same
two functions over torch's matrix product with an fp32 result, so that nobody needs apex for them: the product
lands in `main_grad` in one pass, without a gradient in the model's precision, a cast and an addition.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import torch
from torch import Tensor

APEX_NAME = "fused_weight_gradient_mlp_cuda"


def accumulate(input_TI: Tensor, grad_TO: Tensor, main_grad_OI: Tensor) -> None:
    """main_grad += gradᵀ · input, summed in fp32 where the device can.

    Args:
        input_TI, grad_TO: a linear layer's input and the gradient of its output, one type.
        main_grad_OI: float32, or the type of the others.
    """
    if main_grad_OI.dtype == input_TI.dtype:
        main_grad_OI.addmm_(grad_TO.t(), input_TI)
    elif main_grad_OI.is_cuda:
        torch.addmm(main_grad_OI, grad_TO.t(), input_TI, out_dtype=main_grad_OI.dtype, out=main_grad_OI)
    else:
        main_grad_OI.add_(grad_TO.t() @ input_TI)


def install() -> None:
    """Offer `accumulate` under apex's name, before Megatron looks for it; apex's own module goes first."""
    if APEX_NAME in sys.modules or importlib.util.find_spec(APEX_NAME) is not None:
        return
    module = types.ModuleType(APEX_NAME, __doc__)
    module.__dict__.update(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    sys.modules[APEX_NAME] = module
