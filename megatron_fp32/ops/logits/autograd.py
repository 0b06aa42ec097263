"""`fp32_logits`: the output layer's product with its gradients, tensor parallel or not.

What is rounded, and where: nothing in the forward pass. In the backward pass dY enters with as many bits as
`grad_precision` says; dX is summed over the tensor-parallel ranks in fp32 and rounded once when it leaves; dW stays
fp32 when it can be added to `weight.main_grad`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logits import custom_op
from megatron_fp32.ops.products.backward import accumulate_gradients, bias_grad, pieces_of
from megatron_fp32.ops.products.fixed_order import check_fixed_order
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.grad_precision import PIECES, GradPrecision, check_grad_precision
from megatron_fp32.ops.products.hidden_grad import HiddenGrad
from megatron_fp32.ops.products.main_grad import follows_main_grad, weight_grad_for_autograd, weight_grad_target
from megatron_fp32.ops.products.operands import check_operands, check_plain, check_shapes, piece_dtype
from megatron_fp32.ops.products.ranks import gather_first_dim
from megatron_fp32.ops.traced import is_traced
from megatron_fp32.validation import check_flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeferredWeightGrad:
    """Megatron's `defer_embedding_wgrad_compute`: dW is computed from `buffer` after the pipeline has drained.

    Args:
        buffer: receives dY, [..., vocab / tp] in the dtype of the weight.
        limit: gradients that it takes, 0 for any number; dW of later ones is computed at once.
    """

    buffer: list[Tensor]
    limit: int

    def take(self, grad: Tensor) -> bool:
        """Append the gradient, unless the buffer is full."""
        if self.limit != 0 and len(self.buffer) >= self.limit:
            return False
        self.buffer.append(grad)
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    tp_group: dist.ProcessGroup | None
    """None for a single rank."""
    sequence_parallel: bool
    reduce_hidden_grad: bool
    pieces: int
    deferred: DeferredWeightGrad | None
    invariant: bool


def fp32_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    reduce_hidden_grad: bool = True,
    grad_precision: GradPrecision = "bf16",
    deferred: DeferredWeightGrad | None = None,
    invariant: bool = False,
) -> Tensor:
    """Vocab-parallel logits in fp32: `hidden @ weight.T + bias` with the accumulator kept.

    For FakeTensors, `torch.compile` and `torch.export` this is the operator `megatron_fp32::logits`, if `weight` has
    no `main_grad` and there is one rank. Otherwise the graph breaks here and the eager code runs; the results are
    equal.

    Args:
        hidden: [..., hidden], 2-D or more, in the dtype of the weight; or float32 (an fp32 residual stream) beside a
            weight of 16 bits, of which nothing is rounded; with `sequence_parallel` this rank's slice of dimension 0.
        weight: [vocab / tp, hidden], bfloat16, float16 or float32. A float32 weight beside bfloat16 hidden states is
            multiplied in three bfloat16 pieces, which hold all of it, in the logits and in the gradient of `hidden`:
            three products in place of one. The pieces exist for 8192 rows at a time. When the weight has Megatron's
            `main_grad` and `grad_added_to_main_grad`, its gradient is added there in place and a dummy is returned to
            autograd.
        bias: [vocab / tp] or None; added in fp32.
        tp_group: ranks that hold the other rows of the weight; None for one process.
        sequence_parallel: gather `hidden` over `tp_group` before the product and scatter its gradient after.
        reduce_hidden_grad: sum the gradient of `hidden` over `tp_group`. Megatron calls it `allreduce_dgrad`; it does
            not apply with `sequence_parallel`, which always reduces.
        grad_precision: see `Fp32Config.grad_precision`. With a float32 `hidden` it also sets how many bits of `hidden`
            enter dW. With two float32 operands nothing is rounded, whatever it is.
        deferred: do not compute dW, but keep dY for it; `grad_precision="bf16"` only.
        invariant: a token's logits do not change by a bit with the batch, its place in it, or the number of ranks,
            given hidden states that do not. Does not include gradients.

    Returns:
        [..., vocab / tp] float32, never a view: callers may divide it in place.

    Raises:
        TypeError: for operand dtypes other than these, and for DTensors.
        ValueError: for shapes that do not match, an unknown `grad_precision`, fp32 operands under TF32, `deferred`
            with a split gradient or without `main_grad`, or `invariant` where it cannot be kept.
    """
    for name, flag in (
        ("sequence_parallel", sequence_parallel),
        ("reduce_hidden_grad", reduce_hidden_grad),
        ("invariant", invariant),
    ):
        check_flag(name, flag)
    _check(hidden, weight, bias, grad_precision, deferred)
    parallel = tp_group is not None and dist.get_world_size(tp_group) > 1
    traced = is_traced(weight)
    if invariant and not traced:
        # A compiler does not know addresses; the custom operator checks them when it runs.
        check_fixed_order(hidden, weight)
    if traced and not parallel and not follows_main_grad(weight) and deferred is None:
        return custom_op.logits(hidden, weight, bias, PIECES[grad_precision], invariant)
    options = _Options(
        tp_group=tp_group if parallel else None,
        sequence_parallel=sequence_parallel and parallel,
        reduce_hidden_grad=reduce_hidden_grad and parallel and not sequence_parallel,
        pieces=PIECES[grad_precision],
        deferred=deferred,
        invariant=invariant,
    )
    return _eager(hidden, weight, bias, options)


@torch.compiler.disable
def _eager(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    return _Fp32Logits.apply(hidden, weight, bias, options)


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, grad_precision: str, deferred: DeferredWeightGrad | None
) -> None:
    check_grad_precision(grad_precision)
    check_plain(hidden=hidden, weight=weight, bias=bias)
    check_shapes(hidden, weight)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}], got {tuple(bias.shape)}")
    check_operands(hidden, weight, names=("hidden", "weight"))
    if deferred is None:
        return
    if piece_dtype(hidden.dtype, weight.dtype) != weight.dtype:
        raise ValueError(
            "a deferred weight gradient is a product of dY and the hidden states in the dtype of the weight: "
            f"expected hidden states of {weight.dtype}, got {hidden.dtype}"
        )
    if grad_precision != "bf16":
        raise ValueError(
            f"a deferred weight gradient takes dY in the dtype of the weight, so grad_precision must be 'bf16', "
            f"got {grad_precision!r}"
        )
    if torch.is_grad_enabled() and not (weight.requires_grad and follows_main_grad(weight)):
        raise ValueError(
            "a deferred weight gradient needs a trainable weight with main_grad: DistributedDataParallel makes it, and "
            "a detached or frozen weight (mtp_detach_heads) has none"
        )


class _Fp32Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
        ctx.options = options
        ctx.bias_dtype = None if bias is None else bias.dtype
        # main_grad lives on the Parameter object, which saved-tensor hooks may replace by a copy.
        ctx.weight_owner = weight
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        for_weight_grad = ctx.needs_input_grad[1] and (options.deferred is None or options.deferred.limit != 0)
        ctx.save_for_backward(hidden if for_weight_grad else None, weight)
        if options.sequence_parallel:
            hidden = gather_first_dim(hidden, options.tp_group)
        return logits_product(hidden, weight, bias, fixed_order=options.invariant)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        options: _Options = ctx.options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grad_logits.reshape(-1, weight.shape[0])
        dtype = piece_dtype(ctx.hidden_dtype, weight.dtype)
        if dtype == weight.dtype:
            # TF32 may have been switched on since the forward pass. It does not touch pieces of a weight.
            check_operands(grad, weight, names=("the gradient of the logits", "weight"))
        grad_bias = bias_grad(grad, ctx.bias_dtype) if needs_bias else None

        target = None
        if options.deferred is not None:
            grad = grad.to(weight.dtype)
            if options.deferred.take(grad.view(grad_logits.shape)):
                needs_weight = False
        if needs_weight:
            target = weight_grad_target(ctx.weight_owner)

        # One row where dX is not needed.
        rows = grad.shape[0] if needs_hidden else 1
        reduction = HiddenGrad(
            grad.new_empty(rows, weight.shape[1], dtype=torch.float32),
            group=options.tp_group,
            scatter=options.sequence_parallel,
            reduce=options.reduce_hidden_grad,
        )
        accumulate_gradients(
            pieces_of(grad, options.pieces, dtype),
            weight=weight,
            pieces=options.pieces,
            hidden_sum=reduction.of(slice(None)) if needs_hidden else None,
            hidden=lambda: _whole_hidden(hidden, options),
            weight_grad=target,
            hidden_grad_done=reduction.start,
        )
        grad_weight = weight_grad_for_autograd(ctx.weight_owner, target) if ctx.needs_input_grad[1] else None
        grad_hidden = reduction.finish().view(ctx.hidden_shape).to(ctx.hidden_dtype) if needs_hidden else None
        return grad_hidden, grad_weight, grad_bias, None


def _whole_hidden(hidden: Tensor, options: _Options) -> Tensor:
    whole = gather_first_dim(hidden, options.tp_group) if options.sequence_parallel else hidden
    return whole.reshape(-1, whole.shape[-1])
