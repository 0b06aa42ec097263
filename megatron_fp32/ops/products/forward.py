"""The product of hidden states and weight: logits, before anything is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp32.ops.products.chunks import CHUNK, even_chunks
from megatron_fp32.ops.products.fixed_order import fixed_order_product
from megatron_fp32.ops.products.gemm import sum_of_products_
from megatron_fp32.ops.products.operands import piece_dtype
from megatron_fp32.ops.products.split import split, split_scale


def logits_product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, fixed_order: bool = False) -> Tensor:
    """Logits [..., vocab] float32 of `hidden` [..., hidden].

    A float32 operand beside one of 16 bits is multiplied in three pieces, which together hold all of it. Pieces of the
    weight exist for some rows at a time. With `fixed_order`, which both must have 16 bits for, no logit's bits depend
    on the shape of the others.
    """
    # Allocated in its final shape: a reshape of the product would leave an autograd Function as a view made inside of
    # it, and autograd refuses the in-place division by a temperature on those.
    logits = torch.empty(*hidden.shape[:-1], weight.shape[0], dtype=torch.float32, device=hidden.device)
    tokens = hidden.shape[:-1].numel()
    out, x = logits.view(tokens, weight.shape[0]), hidden.reshape(tokens, hidden.shape[-1])
    if fixed_order:
        fixed_order_product(x, weight, out)
        return logits if bias is None else logits.add_(bias)
    if piece_dtype(x.dtype, weight.dtype) != weight.dtype:
        _multiply_split_weight(x, weight, out)
        return logits if bias is None else logits.add_(bias)
    pieces = split(x, 3, weight.dtype, scale=split_scale(x, 3, weight.dtype))
    sum_of_products_(out, ((part, weight.t()) for part in reversed(pieces.parts)), accumulate=False)
    if pieces.inverse_scale is not None:
        logits.mul_(pieces.inverse_scale)
    return logits if bias is None else logits.add_(bias)


def _multiply_split_weight(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """`out = hidden @ weight.T` for hidden [tokens, hidden] bfloat16 and weight [vocab, hidden] float32."""
    for rows in even_chunks(weight.shape[0], CHUNK):
        pieces = split(weight[rows], 3, hidden.dtype)
        products = ((hidden, part.t()) for part in reversed(pieces.parts))
        sum_of_products_(out[:, rows], products, accumulate=False)
