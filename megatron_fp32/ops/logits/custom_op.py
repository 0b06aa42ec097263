"""`megatron_fp32::logits`: the product on one rank as an operator that FakeTensor, `torch.compile` and export know.

`torch.addmm(out_dtype=)` has no working fake implementation (pytorch#163880), and a loop over chunks with in-place
products is nothing that a compiler should look into: the operator is opaque, its shapes and dtypes are declared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_fp32.ops.products.backward import accumulate_gradients, bias_grad, pieces_of
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.hidden_grad import ChunkedHiddenSum
from megatron_fp32.ops.products.operands import piece_dtype
from megatron_fp32.ops.products.weight_grad import WeightGrad


@torch.library.custom_op("megatron_fp32::logits", mutates_args=())
def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, pieces: int, invariant: bool = False) -> Tensor:
    """`fp32_logits` on one rank, with gradients that are returned; `pieces` of 16 bits stand for dY."""
    return logits_product(hidden, weight, bias, fixed_order=invariant)


@logits.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, pieces: int, invariant: bool = False) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("megatron_fp32::logits_backward", mutates_args=())
def _logits_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias_dtype: torch.dtype | None, pieces: int, needs: list[bool]
) -> list[Tensor]:
    needs_hidden, needs_weight, needs_bias = needs
    grad_2d = grad.reshape(-1, weight.shape[0])
    hidden_2d = hidden.reshape(-1, hidden.shape[-1])
    hidden_grad = torch.empty(hidden_2d.shape, dtype=torch.float32, device=hidden.device) if needs_hidden else None
    weight_grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if needs_weight else None
    accumulate_gradients(
        pieces_of(grad_2d, pieces, piece_dtype(hidden.dtype, weight.dtype)),
        weight=weight,
        pieces=pieces,
        hidden_sum=None if hidden_grad is None else ChunkedHiddenSum(hidden_grad),
        hidden=lambda: hidden_2d,
        weight_grad=None if weight_grad is None else WeightGrad(target=weight_grad, accumulate=False),
        hidden_grad_done=lambda: None,
    )
    grads = []
    if hidden_grad is not None:
        grads.append(hidden_grad.view(hidden.shape).to(hidden.dtype))
    if weight_grad is not None:
        grads.append(weight_grad)
    if needs_bias:
        assert bias_dtype is not None
        grads.append(bias_grad(grad_2d, bias_dtype))
    return grads


@_logits_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias_dtype: torch.dtype | None, pieces: int, needs: list[bool]
) -> list[Tensor]:
    bias = [] if bias_dtype is None else [weight.new_empty(weight.shape[0], dtype=bias_dtype)]
    like = [hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), *bias]
    return [tensor for tensor, needed in zip(like, needs, strict=False) if needed]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, ctx.pieces, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = iter(_logits_backward(grad, hidden, weight, ctx.bias_dtype, ctx.pieces, needs))
    return (*(next(grads) if needed else None for needed in needs), None, None)


logits.register_autograd(_backward, setup_context=_setup)
