"""Megatron's protocol for the gradient of a weight: where dW goes, and what autograd is told.

The protocol has two sides. `LinearWithGradAccumulationAndAsyncCommunication.backward`
(megatron/core/tensor_parallel/layers.py) adds dW to `main_grad` and sets `grad_added_to_main_grad`.
DistributedDataParallel's backward hook then leaves `param.grad` alone, unless `zero_out_wgrad` announces that the
gradient of a tied embedding comes through `param.grad`, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp32.ops.products.weight_grad import WeightGrad


def follows_main_grad(weight: Tensor) -> bool:
    """Whether Megatron's DistributedDataParallel keeps a gradient buffer for this weight.

    Megatron-FSDP has a buffer too, but only its hooks know whether a gradient overwrites the buffer or is added to it.
    They take a real gradient, so the answer for its weights is False.
    """
    if hasattr(weight, "__fsdp_param__"):
        return False
    return getattr(weight, "main_grad", None) is not None and hasattr(weight, "grad_added_to_main_grad")


def weight_grad_target(weight: Tensor) -> WeightGrad:
    """Where dW is written: `main_grad`, or a new tensor like the weight."""
    if follows_main_grad(weight):
        return WeightGrad(target=weight.main_grad, accumulate=True)  # type: ignore[attr-defined]
    new = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return WeightGrad(target=new, accumulate=False)


def weight_grad_for_autograd(weight: Tensor, written: WeightGrad | None) -> Tensor | None:
    """What the autograd Function returns for the weight.

    Args:
        weight: the Parameter.
        written: from `weight_grad_target`, complete; None when dW will be added to `main_grad` later.
    """
    if not follows_main_grad(weight):
        return None if written is None else written.target
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # DDP's hook runs only for a gradient that is not None.
    dummy = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return dummy(weight.main_grad.shape, dtype=weight.dtype, device=weight.device)  # type: ignore[attr-defined]
