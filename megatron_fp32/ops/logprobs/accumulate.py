"""dY of a block of tokens on its way into the products, and dW over several blocks."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logprobs.gradient import gradient_bounds, gradient_scale, softmax_gradient
from megatron_fp32.ops.logprobs.options import OperatorOptions
from megatron_fp32.ops.logprobs.softmax import Softmax
from megatron_fp32.ops.logprobs.statistics import KeptLogits
from megatron_fp32.ops.products.fixed_order import why_not_fixed_order
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.hidden_grad import HiddenGrad
from megatron_fp32.ops.products.invariant_hidden_grad import InvariantHiddenGrad
from megatron_fp32.ops.products.operands import piece_dtype
from megatron_fp32.ops.products.split import Pieces
from megatron_fp32.ops.products.weight_grad import WeightGrad


class LogitsGradient:
    """dY of a block of tokens, columns at a time, as `accumulate_gradients` asks for it.

    Args:
        hidden: [tokens, hidden].
        weight: [columns, hidden], this rank's rows.
        labels: [tokens] int32, from `Shard.local_labels`.
        vectors: from `gradient_vectors`.
        kept: the logits of the tokens; None to multiply again.
        consume: the kept logits may be overwritten.
        softmax: over the vocabulary, with this rank's columns.
        pieces: how many stand for dY.
        bias: [columns] that was added to the products, or None; kept logits have it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        labels: Tensor,
        vectors: Tensor,
        kept: KeptLogits | None,
        consume: bool = False,
        softmax: Softmax,
        pieces: int,
        bias: Tensor | None = None,
    ) -> None:
        self._bias = bias
        self._hidden, self._weight, self._labels = hidden, weight, labels
        self._vectors, self._kept = vectors.contiguous(), kept
        self._softmax, self._pieces = softmax, pieces
        self._consume = consume or kept is None
        self._dtype = piece_dtype(hidden.dtype, weight.dtype)
        self._scale = gradient_scale(self._vectors, softmax, count=pieces, dtype=self._dtype)
        self._fixed = softmax.invariant and why_not_fixed_order(hidden, weight) is None

    def bounds(self) -> Tensor:
        """[tokens] float32, at least the sum of |dY| over the whole vocabulary."""
        return gradient_bounds(self._vectors, self._softmax)

    def __call__(self, rows: slice) -> Pieces:
        """[tokens, columns] in pieces."""
        if self._kept is None:
            bias = None if self._bias is None else self._bias[rows]
            raw = logits_product(self._hidden, self._weight[rows], bias, fixed_order=self._fixed)
        else:
            assert self._kept.tops is None
            raw = self._kept.values[:, rows]
        return softmax_gradient(
            raw,
            self._vectors,
            self._labels,
            self._softmax,
            first=rows.start,
            count=self._pieces,
            dtype=self._dtype,
            scale=self._scale,
            consume=self._consume,
        )


def finished_hidden_grad(reduction: HiddenGrad, live: Tensor, hidden: Tensor, options: OperatorOptions) -> Tensor:
    """dX in the shape and dtype of `hidden`, summed over the ranks, and 0 for all ranks' tokens that are not `live`.

    A weight that is NaN would make them NaN: a product of zeros with it is.
    """
    grad = reduction.finish()
    if options.sequence_parallel:
        live = live[dist.get_rank(options.softmax.shard.group) * len(grad) :][: len(grad)]
    return grad.masked_fill_(~live[:, None], 0.0).view(hidden.shape).to(hidden.dtype)


def room_for_hidden_grad(tokens: int, weight: Tensor, options: OperatorOptions) -> HiddenGrad:
    """For dX [tokens, hidden] of all ranks' tokens, in the order of summation that the options ask for."""
    shard = options.softmax.shard
    reduced = shard.group is None or options.sequence_parallel or options.reduce_hidden_grad
    if options.softmax.invariant and reduced:
        return InvariantHiddenGrad(
            tokens, weight, shard=shard, pieces=options.pieces, scatter=options.sequence_parallel
        )
    return HiddenGrad(
        torch.empty(tokens, weight.shape[1], dtype=torch.float32, device=weight.device),
        group=shard.group,
        scatter=options.sequence_parallel,
        reduce=options.reduce_hidden_grad,
        valid=shard.valid_columns,
    )


class FloatWeightGrad:
    """dW over several blocks of tokens: in fp32 until the last one, whatever dtype its target has."""

    def __init__(self, target: WeightGrad | None, *, blocks: int) -> None:
        self._target, self._sum = target, target
        if target is not None and blocks > 1 and target.target.dtype != torch.float32:
            self._sum = WeightGrad(target=torch.empty_like(target.target, dtype=torch.float32), accumulate=False)

    def part(self, *, first: bool) -> WeightGrad | None:
        """Where the next block's dW goes."""
        if self._sum is None or first:
            return self._sum
        return dataclasses.replace(self._sum, accumulate=True)

    def finish(self) -> None:
        """Round once, where the target wants it."""
        if self._sum is self._target:
            return
        assert self._sum is not None
        assert self._target is not None
        if self._target.accumulate:
            self._target.target.add_(self._sum.target)
        else:
            self._target.target.copy_(self._sum.target)
