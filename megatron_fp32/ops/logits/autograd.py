"""`fp32_logits`: the output layer's product with its gradients, tensor parallel or not.

What is rounded, and where: nothing in the forward pass. In the backward pass dY is rounded once to the dtype of the
weight; dX is summed over the tensor-parallel ranks in fp32 and rounded once when it leaves; dW stays fp32 when it can
be added to `weight.main_grad`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fp32.config import GradPrecision
from megatron_fp32.ops.logits.gemm import addmm_fp32_, check_operands, mm_fp32


def fp32_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    reduce_hidden_grad: bool = True,
    grad_precision: GradPrecision = "bf16",
) -> Tensor:
    """Vocab-parallel logits in fp32: `hidden @ weight.T + bias` with the accumulator kept.

    Args:
        hidden: [..., hidden], 2-D to 4-D, bfloat16, float16 or float32; with `sequence_parallel` this rank's slice of
            dimension 0.
        weight: [vocab / tp, hidden], the dtype of `hidden`. When it has Megatron's `main_grad` and
            `grad_added_to_main_grad`, its gradient is added there in place and a dummy is returned to autograd.
        bias: [vocab / tp] or None; added in fp32.
        tp_group: ranks that hold the other rows of the weight; None for one process.
        sequence_parallel: gather `hidden` over `tp_group` before the product and scatter its gradient after.
        reduce_hidden_grad: sum the gradient of `hidden` over `tp_group`. Megatron calls it `allreduce_dgrad`; it does
            not apply with `sequence_parallel`, which always reduces.
        grad_precision: see `Fp32Config.grad_precision`.

    Returns:
        [..., vocab / tp] float32, never a view: callers may divide it in place.

    Raises:
        TypeError: for operand dtypes that differ or are not floating point of 16 or 32 bits.
        ValueError: for shapes that do not match, an unknown `grad_precision`, or fp32 operands under TF32.
    """
    if grad_precision != "bf16":
        raise ValueError(f"grad_precision must be 'bf16', got {grad_precision!r}")
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "expected hidden [..., hidden] of 2 or more dimensions and weight [vocab, hidden], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}], got {tuple(bias.shape)}")
    check_operands(hidden, weight, names=("hidden", "weight"))
    return _Fp32Logits.apply(hidden, weight, bias, tp_group, sequence_parallel, reduce_hidden_grad)


class _Fp32Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tp_group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        reduce_hidden_grad: bool,
    ) -> Tensor:
        parallel = tp_group is not None and dist.get_world_size(tp_group) > 1
        ctx.tp_group = tp_group if parallel else None
        ctx.sequence_parallel = sequence_parallel and parallel
        ctx.reduce_hidden_grad = reduce_hidden_grad and parallel and not sequence_parallel
        ctx.bias_dtype = None if bias is None else bias.dtype
        # main_grad lives on the Parameter object, which saved-tensor hooks may replace by a copy.
        ctx.weight_owner = weight
        ctx.save_for_backward(hidden, weight)

        if ctx.sequence_parallel:
            hidden = _gather_first_dim(hidden, tp_group)
        # Allocated in its final shape: a reshape of the product would leave here as a view made inside a custom
        # Function, and autograd refuses the in-place division by a temperature on those.
        logits = hidden.new_empty(*hidden.shape[:-1], weight.shape[0], dtype=torch.float32)
        mm_fp32(hidden.reshape(-1, hidden.shape[-1]), weight.t(), out=logits.view(-1, weight.shape[0]))
        return logits if bias is None else logits.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_2d = grad_logits.reshape(-1, weight.shape[0])
        grad_low = grad_2d.to(weight.dtype)
        check_operands(grad_low, weight, names=("the gradient of the logits", "weight"))

        grad_hidden, pending = None, None
        if needs_hidden:
            partial = mm_fp32(grad_low, weight)
            grad_hidden, pending = _start_hidden_reduction(ctx, partial)

        grad_weight = None
        if needs_weight:
            full = _gather_first_dim(hidden, ctx.tp_group) if ctx.sequence_parallel else hidden
            grad_weight = _weight_grad(ctx.weight_owner, grad_low, full.reshape(-1, full.shape[-1]))

        grad_bias = grad_2d.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None

        if pending is not None:
            pending.wait()
        if grad_hidden is not None:
            grad_hidden = grad_hidden.view(hidden.shape).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _start_hidden_reduction(ctx: Any, partial: Tensor) -> tuple[Tensor, dist.Work | None]:
    """Begin the sum of this rank's fp32 dX over the ranks; it overlaps with the weight's gradient."""
    if ctx.sequence_parallel:
        world = dist.get_world_size(ctx.tp_group)
        scattered = partial.new_empty(partial.shape[0] // world, partial.shape[1])
        return scattered, dist.reduce_scatter_tensor(scattered, partial, group=ctx.tp_group, async_op=True)
    if ctx.reduce_hidden_grad:
        return partial, dist.all_reduce(partial, group=ctx.tp_group, async_op=True)
    return partial, None


def _gather_first_dim(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    gathered = tensor.new_empty(tensor.shape[0] * dist.get_world_size(group), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered


def _weight_grad(weight: Tensor, grad_2d: Tensor, hidden_2d: Tensor) -> Tensor:
    """dW, added to `main_grad` where Megatron keeps one, else returned.

    The protocol is that of megatron-core's `LinearWithGradAccumulationAndAsyncCommunication.backward`
    (tensor_parallel/layers.py) and of DistributedDataParallel's backward hook, which skips a gradient whose parameter
    says `grad_added_to_main_grad`, unless it also says `zero_out_wgrad`: then the dummy must be zeros, because the
    embedding's gradient is added to it.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not hasattr(weight, "grad_added_to_main_grad") or hasattr(weight, "__fsdp_param__"):
        return mm_fp32(grad_2d.t(), hidden_2d).to(weight.dtype)
    if main_grad.dtype == torch.float32:
        addmm_fp32_(main_grad, grad_2d.t(), hidden_2d)
    else:
        main_grad.add_(mm_fp32(grad_2d.t(), hidden_2d))
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    dummy = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return dummy(main_grad.shape, dtype=weight.dtype, device=weight.device)
