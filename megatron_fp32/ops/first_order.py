"""An error for gradients that cannot be differentiated again.

A fused operator computes its first derivative only. torch's `once_differentiable` raises in a double backward pass
only where an upstream gradient requires a gradient itself. Where none does, as under `loss.sum()`, the gradients would
be returned as constants, and a gradient penalty would lack terms without an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `backward` of an autograd Function, below `staticmethod`.

    The gradients stay what they are. With `create_graph=True` they raise RuntimeError when they are differentiated.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor | None) -> Any:
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return grads
        return tuple(None if g is None else _Undifferentiable.apply(g.detach().requires_grad_()) for g in grads)

    return wrapper


class _Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(
            "megatron_fp32 computes first derivatives only: this gradient was made with create_graph=True, and cannot "
            "be differentiated again. Use torch.nn.functional.linear for logits whose second derivatives you need"
        )
