"""dY of a block of tokens on its way into the products, and dW over several blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logprobs import workspace
from megatron_fp32.ops.logprobs.gradient import gradient_bounds, gradient_scale, softmax_gradient
from megatron_fp32.ops.logprobs.options import OperatorOptions, rows_where
from megatron_fp32.ops.logprobs.softmax import Softmax
from megatron_fp32.ops.logprobs.statistics import KeptLogits
from megatron_fp32.ops.products.backward import accumulate_gradients
from megatron_fp32.ops.products.bias_grad import BiasGrad
from megatron_fp32.ops.products.chunks import even_chunks
from megatron_fp32.ops.products.fixed_order import why_not_fixed_order
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.hidden_grad import HiddenGrad
from megatron_fp32.ops.products.invariant_hidden_grad import InvariantHiddenGrad
from megatron_fp32.ops.products.main_grad import weight_grad_for_autograd, weight_grad_target
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
        cuts: [tokens] float32: columns with a lower logit, but for the label, have no part in the softmax; None when
            all have.
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
        cuts: Tensor | None = None,
        consume: bool = False,
        softmax: Softmax,
        pieces: int,
        bias: Tensor | None = None,
    ) -> None:
        self._bias = bias
        self._hidden, self._weight, self._labels = hidden, weight, labels
        self._vectors, self._kept, self._cuts = vectors.contiguous(), kept, cuts
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
            cuts=self._cuts,
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


class BlockGradient(Protocol):
    """dY of a block of tokens."""

    def __call__(self, rows: slice) -> Pieces:
        """[tokens, columns] in pieces, for some rows of the weight; called once for each."""

    def bounds(self) -> Tensor:
        """[tokens] float32, at least the sum of |dY| over the whole vocabulary."""


def accumulate_blocks(
    gradient_of: Callable[[slice], BlockGradient],
    x: Tensor,
    weight: Tensor,
    live: Tensor,
    options: OperatorOptions,
    *,
    reduction: HiddenGrad | None,
    target: WeightGrad | None,
    bias_grad: BiasGrad | None = None,
    products: int = 1,
    blocks: list[slice] | None = None,
) -> None:
    """dX and dW, one block of tokens and of columns at a time.

    Args:
        gradient_of: gives dY of a block of tokens.
        x: [tokens, hidden] of all ranks.
        weight: [columns, hidden], this rank's rows.
        live: [tokens] bool: whose dY is not 0.
        options: of the operator.
        reduction: where dX goes, whose sum over the ranks is started here; None when it is not needed.
        target: where dW goes; None when it is not needed.
        bias_grad: where dbias goes; None when it is not needed.
        products: how many fp32 products exist for each element of dY; 0 where the logits are in memory already.
        blocks: of tokens; None to choose.
    """
    if blocks is None:
        blocks = even_chunks(len(x), options.chunk_size or workspace.GRADIENT_TOKENS)
    of_pieces = options.pieces_of(x, weight) * piece_dtype(x.dtype, weight.dtype).itemsize
    per_element = 4 * products + of_pieces
    room = workspace.workspace_bytes(weight.device, parallel=options.softmax.shard.group is not None)
    sums = FloatWeightGrad(target, blocks=len(blocks))
    if not blocks:
        # Nothing to add, but other ranks and autograd expect their answers.
        blocks = [slice(0, 0)]
    for tokens in blocks:
        count = max(1, tokens.stop - tokens.start)
        # dW takes a copy of the hidden states.
        copied = 0 if target is None else count * x.shape[1] * x.element_size()
        columns = max(128, (room - copied) // (per_element * count) // 128 * 128)
        grad = gradient_of(tokens)
        last = tokens is blocks[-1]
        accumulate_gradients(
            grad,
            weight=weight,
            pieces=options.pieces,
            chunk=columns,
            hidden_sum=None if reduction is None else reduction.of(tokens, grad.bounds),
            hidden=lambda tokens=tokens: rows_where(live[tokens], x[tokens]),  # type: ignore[misc]
            weight_grad=sums.part(first=tokens is blocks[0]),
            hidden_grad_done=reduction.start if last and reduction is not None else lambda: None,
            bias_grad=bias_grad,
        )
    sums.finish()


class OperatorGradients(NamedTuple):
    """What the backward pass of an operator returns to autograd."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def operator_gradients(
    gradient_of: Callable[[slice], BlockGradient],
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: Tensor,
    options: OperatorOptions,
    *,
    owner: Tensor,
    needs: tuple[bool, bool, bool],
    products: int = 1,
    blocks: list[slice] | None = None,
) -> OperatorGradients:
    """dX, dW and dbias, from dY of blocks of tokens.

    Args:
        gradient_of: see `accumulate_blocks`, as for the other arguments that are not listed here.
        x: from `whole_hidden`.
        hidden: as the operator was given it.
        weight: [columns, hidden], this rank's rows.
        bias: [columns], or None.
        live: [tokens] bool: whose dY is not 0.
        options: of the operator.
        owner: the Parameter that may have a `main_grad`.
        needs: which of the three gradients are asked for.
        products: see `accumulate_blocks`.
        blocks: see `accumulate_blocks`.
    """
    needs_hidden, needs_weight, needs_bias = needs
    target = weight_grad_target(owner) if needs_weight else None
    reduction = room_for_hidden_grad(len(x), weight, options) if needs_hidden else None
    bias_grad = BiasGrad(bias) if bias is not None and needs_bias else None
    accumulate_blocks(
        gradient_of,
        x,
        weight,
        live,
        options,
        reduction=reduction,
        target=target,
        bias_grad=bias_grad,
        products=products,
        blocks=blocks,
    )
    grad_hidden = None if reduction is None else finished_hidden_grad(reduction, live, hidden, options)
    # Before the dummy gradient of a weight with main_grad, which is as large as the weight.
    del reduction
    return OperatorGradients(
        hidden=grad_hidden,
        weight=weight_grad_for_autograd(owner, target) if needs_weight else None,
        bias=None if bias_grad is None else bias_grad.finish(),
    )
