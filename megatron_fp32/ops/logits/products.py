"""The three products of the output layer on one rank: logits, dX and dW. The last two go by chunks of the vocabulary.

Chunks serve three ends. dX contracts over the vocabulary, and a tensor core truncates as it accumulates: over 150
thousand terms that costs more bits than a second piece of dY would bring, unless partial sums are added in fp32. The
16-bit pieces of dY exist for one chunk at a time. And dW of a chunk is complete as soon as it is computed, so that it
needs no fp32 buffer of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_fp32.ops.logits.fixed_order import fixed_order_product
from megatron_fp32.ops.logits.gemm import addmm_fp32_, mm_fp32
from megatron_fp32.ops.logits.split import Pieces, split, split_scale

CHUNK = 8192
"""Terms that one product accumulates when dY is split: vocabulary rows for dX, tokens for dW."""

UNSPLIT_CHUNK = 4 * CHUNK
"""Vocabulary rows at a time when dY is rounded once: that error hides the accumulator's, and larger products are
faster."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightGrad:
    """Where dW goes.

    Args:
        target: [vocab / tp, hidden], any floating dtype.
        accumulate: add to what is there, instead of overwriting it.
    """

    target: Tensor
    accumulate: bool

    def add_rows(
        self, rows: slice, grads: tuple[Tensor, ...], hiddens: tuple[Tensor, ...], inverse_scale: Tensor | None
    ) -> None:
        """Add `dY.T @ hidden`, both in pieces, accumulated in fp32, to these rows of the target."""
        target = self.target[rows]
        products = _weight_products(grads, hiddens)
        if target.dtype == torch.float32 and inverse_scale is None:
            if not (self.accumulate and _add_by_kernel(target, grads, hiddens)):
                sum_of_products_(target, products, accumulate=self.accumulate)
            return
        part = torch.empty_like(target, dtype=torch.float32, memory_format=torch.contiguous_format)
        sum_of_products_(part, products, accumulate=False)
        if inverse_scale is not None:
            part.mul_(inverse_scale)
        if self.accumulate:
            target.add_(part)
        else:
            target.copy_(part)


class HiddenSum(Protocol):
    """dX of some tokens, while chunks of the vocabulary are added to it."""

    def chunks(self, columns: int, largest: int) -> list[slice]:
        """Every one of `columns` rows of the weight once, at most `largest` at a time, in the order of the sum."""

    def add(self, columns: slice, grad: Pieces, weight: Tensor) -> None:
        """Add `grad @ weight` of one chunk: [tokens, columns] in pieces, and [columns, hidden]."""

    def finish(self, inverse_scale: Tensor | None) -> None:
        """All chunks were added; `inverse_scale` is that of their pieces."""


class ChunkedHiddenSum:
    """The usual `HiddenSum`: chunks from first to last.

    Args:
        out: [tokens, hidden] float32 to write into.
        valid: rows of the weight from here on are padding, which is left out: its dY is 0, but it may be NaN. None when
            there is none.
    """

    def __init__(self, out: Tensor, *, valid: int | None = None) -> None:
        self._out, self._valid = out, valid

    def chunks(self, columns: int, largest: int) -> list[slice]:
        """From first to last."""
        return list(chunks_of(columns, largest))

    def add(self, columns: slice, grad: Pieces, weight: Tensor) -> None:
        """Small terms first."""
        count = len(weight) if self._valid is None else max(0, min(columns.stop, self._valid) - columns.start)
        products = ((part[:, :count], weight[:count]) for part in reversed(grad.parts))
        sum_of_products_(self._out, products, accumulate=columns.start > 0)

    def finish(self, inverse_scale: Tensor | None) -> None:
        """Undo the scale."""
        if inverse_scale is not None:
            self._out.mul_(inverse_scale)


def logits_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, fixed_order: bool = False) -> Tensor:
    """Logits [..., vocab] float32 of `hidden` [..., hidden].

    A float32 `hidden` beside a weight of 16 bits is multiplied in three pieces, which together hold all of it. With
    `fixed_order`, which both must have 16 bits for, no logit's bits depend on the shape of the others.
    """
    # Allocated in its final shape: a reshape of the product would leave an autograd Function as a view made inside of
    # it, and autograd refuses the in-place division by a temperature on those.
    logits = torch.empty(*hidden.shape[:-1], weight.shape[0], dtype=torch.float32, device=hidden.device)
    out, x = logits.view(-1, weight.shape[0]), hidden.reshape(-1, hidden.shape[-1])
    if fixed_order:
        fixed_order_product(x, weight, out)
        return logits if bias is None else logits.add_(bias)
    pieces = split(x, 3, weight.dtype, scale=split_scale(x, 3, weight.dtype))
    sum_of_products_(out, ((part, weight.t()) for part in reversed(pieces.parts)), accumulate=False)
    if pieces.inverse_scale is not None:
        logits.mul_(pieces.inverse_scale)
    return logits if bias is None else logits.add_(bias)


def bias_grad(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """dbias [vocab] of dY [tokens, vocab]: summed in fp32, rounded once."""
    return grad.sum(0, dtype=torch.float32).to(dtype)


def pieces_of(grad: Tensor, pieces: int, dtype: torch.dtype) -> Callable[[slice], Pieces]:
    """dY [tokens, vocab / tp], float32 or already of `dtype`, as `accumulate_gradients` takes it."""
    scale = split_scale(grad, pieces, dtype)
    return lambda rows: split(grad[:, rows], pieces, dtype, scale=scale)


def accumulate_gradients(
    grad: Callable[[slice], Pieces],
    *,
    weight: Tensor,
    pieces: int,
    chunk: int | None = None,
    hidden_sum: HiddenSum | None,
    hidden: Callable[[], Tensor] | None,
    weight_grad: WeightGrad | None,
    hidden_grad_done: Callable[[], None],
) -> None:
    """Compute dX and dW.

    Args:
        grad: gives the columns of dY for a slice of the vocabulary, [tokens, columns] in pieces that share one scale;
            called once for each.
        weight: [vocab / tp, hidden].
        pieces: how many 16-bit tensors stand for dY.
        chunk: vocabulary rows at a time; with dX at most as many as usual.
        hidden_sum: where dX goes; None when it is not needed.
        hidden: gives the [tokens, hidden] that were multiplied; called once, when dW needs them.
        weight_grad: where dW goes; None when it is not needed.
        hidden_grad_done: called when dX is complete, while products for dW are still to come: its reduction over the
            ranks overlaps with those.
    """
    hidden_pieces: Pieces | None = None
    usual = CHUNK if pieces > 1 else UNSPLIT_CHUNK
    largest = usual if chunk is None else min(usual, chunk)
    if hidden_sum is not None:
        chunks = hidden_sum.chunks(weight.shape[0], largest)
    else:
        # A column's dW knows nothing of the other columns: only memory limits their number.
        chunks = list(chunks_of(weight.shape[0], chunk or usual))
    for rows in chunks:
        dy = grad(rows)
        if hidden_sum is not None:
            hidden_sum.add(rows, dy, weight[rows])
        if rows is chunks[-1] and hidden_sum is not None:
            hidden_sum.finish(dy.inverse_scale)
            hidden_grad_done()
        if weight_grad is not None:
            assert hidden is not None
            if hidden_pieces is None:
                x = hidden()
                scale = split_scale(x, pieces, weight.dtype, may_overflow=False)
                hidden_pieces = split(x, pieces, weight.dtype, scale=scale)
            weight_grad.add_rows(rows, dy.parts, hidden_pieces.parts, _product(dy.inverse_scale, hidden_pieces))
        # Its memory is for the next one.
        del dy


def sum_of_products_(out: Tensor, products: Iterable[tuple[Tensor, Tensor]], *, accumulate: bool) -> Tensor:
    """`out = sum of a @ b`, or `+=` with `accumulate`, in fp32; out [m, n] float32, a [m, k] and b [k, n]."""
    for a, b in products:
        if accumulate:
            addmm_fp32_(out, a, b)
        else:
            mm_fp32(a, b, out=out)
        accumulate = True
    return out


def _weight_products(grads: tuple[Tensor, ...], hiddens: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """The products whose sum is dW, small ones first; those beyond the precision of dY are left out."""
    order = max(len(grads), len(hiddens))
    chunk = CHUNK if order > 1 else max(1, grads[0].shape[0])
    pairs = [(i, j) for i in range(len(grads)) for j in range(len(hiddens)) if i + j < order]
    for i, j in sorted(pairs, key=sum, reverse=True):
        for tokens in chunks_of(grads[i].shape[0], chunk):
            yield grads[i][tokens].t(), hiddens[j][tokens]


def _add_by_kernel(target: Tensor, grads: tuple[Tensor, ...], hiddens: tuple[Tensor, ...]) -> bool:
    """Add dW with the kernel made for it; False, and nothing is added, where it does not apply, or a library is better.

    It forms the sum over the pieces before it touches memory. That pays while few tokens make memory the bottleneck;
    with more, it would only make one long chain of sums, which a tensor core truncates.
    """
    if not target.is_cuda or len(grads) == 1 or len(grads[0]) > CHUNK // 2:
        return False
    from megatron_fp32.ops.logits.weight_grad_triton import add_weight_grad, can_add_weight_grad

    if not can_add_weight_grad(target, grads, hiddens):
        return False
    with torch.cuda.device(target.device):
        add_weight_grad(target, grads, hiddens[0])
    return True


def _product(inverse_scale: Tensor | None, pieces: Pieces) -> Tensor | None:
    if inverse_scale is None or pieces.inverse_scale is None:
        return pieces.inverse_scale if inverse_scale is None else inverse_scale
    return inverse_scale * pieces.inverse_scale


def chunks_of(length: int, size: int) -> Iterator[slice]:
    """Slices of nearly equal length, multiples of 128 but the last, at most `size` long; one for a length of 0.

    Lengths that are no multiple of 8 would take cuBLAS off its fast path.
    """
    count = max(1, -(-length // size))
    step = max(1, -(-length // count // 128) * 128 if count > 1 else length)
    for start in range(0, max(length, 1), step):
        yield slice(start, min(start + step, length))
