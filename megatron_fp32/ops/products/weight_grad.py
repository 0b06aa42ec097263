"""dW of some columns of dY, accumulated in fp32 into whatever the weight's gradient is kept in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_fp32.ops.products.chunks import CHUNK, even_chunks
from megatron_fp32.ops.products.gemm import sum_of_products_
from megatron_fp32.ops.products.split import small_first


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


def _weight_products(grads: tuple[Tensor, ...], hiddens: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """The products whose sum is dW, small ones first; those beyond the precision of dY are left out."""
    order = max(len(grads), len(hiddens))
    tokens = grads[0].shape[0]
    # Without tokens there is one empty product, which writes zeros.
    chunks = even_chunks(tokens, CHUNK if order > 1 else tokens) or [slice(0, 0)]
    for i, j in small_first(len(grads), len(hiddens)):
        for rows in chunks:
            yield grads[i][rows].t(), hiddens[j][rows]


def _add_by_kernel(target: Tensor, grads: tuple[Tensor, ...], hiddens: tuple[Tensor, ...]) -> bool:
    """Add dW with the kernel made for it; False, and nothing is added, where it does not apply, or a library is better.

    It forms the sum over the pieces before it touches memory. That pays while few tokens make memory the bottleneck;
    with more, it would only make one long chain of sums, which a tensor core truncates.
    """
    if not target.is_cuda or len(grads) == 1 or len(grads[0]) > CHUNK // 2:
        return False
    from megatron_fp32.ops.products.weight_grad_triton import add_weight_grad, can_add_weight_grad

    if not can_add_weight_grad(target, grads, hiddens):
        return False
    with torch.cuda.device(target.device):
        add_weight_grad(target, grads, hiddens[0])
    return True
