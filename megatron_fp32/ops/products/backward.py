"""dX and dW of one rank, by chunks of the vocabulary.

Chunks have three purposes. dX contracts over the vocabulary, and a tensor core truncates as it accumulates: over 150
thousand terms that costs more bits than a second piece of dY would bring, unless partial sums are added in fp32. The
16-bit pieces of dY exist for one chunk at a time. And dW of a chunk is complete as soon as it is computed, so that it
needs no fp32 buffer of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_fp32.ops.products.bias_grad import BiasGrad
from megatron_fp32.ops.products.chunks import CHUNK, UNSPLIT_CHUNK, even_chunks
from megatron_fp32.ops.products.hidden_grad import HiddenSum
from megatron_fp32.ops.products.split import Pieces, split, split_scale
from megatron_fp32.ops.products.weight_grad import WeightGrad


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
    bias_grad: BiasGrad | None = None,
) -> None:
    """Compute dX, dW and dbias.

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
        bias_grad: where dbias goes; None when it is not needed.
    """
    hidden_pieces: Pieces | None = None
    usual = CHUNK if pieces > 1 else UNSPLIT_CHUNK
    largest = usual if chunk is None else min(usual, chunk)
    if hidden_sum is not None:
        chunks = hidden_sum.chunks(weight.shape[0], largest)
    else:
        # dW of a column does not depend on the other columns: only memory limits their number.
        chunks = even_chunks(weight.shape[0], chunk or usual) or [slice(0, 0)]
    for rows in chunks:
        dy = grad(rows)
        if bias_grad is not None:
            bias_grad.add_rows(rows, dy)
        if hidden_sum is not None:
            hidden_sum.add(rows, dy, weight[rows])
        if rows is chunks[-1] and hidden_sum is not None:
            hidden_sum.finish(dy.inverse_scale)
            hidden_grad_done()
        if weight_grad is not None:
            assert hidden is not None
            if hidden_pieces is None:
                x = hidden()
                dtype = dy.parts[0].dtype
                hidden_pieces = split(x, pieces, dtype, scale=split_scale(x, pieces, dtype, may_overflow=False))
            weight_grad.add_rows(rows, dy.parts, hidden_pieces.parts, _product(dy.inverse_scale, hidden_pieces))
        # Its memory is for the next one.
        del dy


def _product(inverse_scale: Tensor | None, pieces: Pieces) -> Tensor | None:
    if inverse_scale is None or pieces.inverse_scale is None:
        return pieces.inverse_scale if inverse_scale is None else inverse_scale
    return inverse_scale * pieces.inverse_scale
