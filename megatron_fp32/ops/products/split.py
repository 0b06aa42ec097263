"""An fp32 tensor as a sum of 16-bit ones, so that a tensor core can multiply all of it.

`hi = round(x); mid = round(x - hi); lo = round(x - hi - mid)`: both subtractions are exact in fp32, so two bfloat16
pieces hold 16 significant bits and three hold all 24 (values whose last piece falls below bfloat16's smallest denormal,
2^-133, excepted). float16 pieces hold 11 bits each, in a range that is too small for gradients: they are taken of
`x * scale` with a power of two that puts the largest magnitude just below 2^15.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SPLIT_EXPONENT = 15
"""Pieces in float16 are scaled to magnitudes below 2^15, half of the largest float16."""


class Pieces(NamedTuple):
    """`x * scale` is the sum of `parts`, as far as they hold it."""

    parts: tuple[Tensor, ...]
    """The pieces, largest first."""
    inverse_scale: Tensor | None
    """[] float32, what a product of the pieces must be multiplied by. None: 1."""


def split(x: Tensor, count: int, dtype: torch.dtype, *, scale: Tensor | None = None) -> Pieces:
    """Split `x` into `count` pieces of `dtype`.

    Without a scale a single piece is `x.to(dtype)`. An `x` that has `dtype` already is its own piece, whatever `count`
    is. An infinite or NaN value stays in the first piece and leaves zeros in the others.

    Args:
        x: [rows, columns] float32, or a tensor of `dtype`.
        count: 1, 2 or 3.
        dtype: bfloat16, float16, or the dtype of `x`.
        scale: from `split_scale`, for float16 pieces; required for more than one.
    """
    if x.dtype == dtype:
        return Pieces((x,), None)
    assert scale is None or dtype == torch.float16
    assert scale is not None or dtype != torch.float16 or count == 1
    if x.is_cuda:
        from megatron_fp32.ops.products.split_triton import split_triton

        with torch.cuda.device(x.device):
            parts = split_triton(x, count, dtype, scale)
    else:
        parts = split_torch(x, count, dtype, scale)
    return Pieces(parts, None if scale is None else scale.reciprocal())


def small_first(first: int, second: int) -> list[tuple[int, int]]:
    """Which pieces of two factors to multiply, small products first.

    Products beyond the precision of the factor with more pieces are left out.

    Args:
        first: how many pieces the one factor has.
        second: how many the other one has.
    """
    pairs = [(i, j) for i in range(first) for j in range(second) if i + j < max(first, second)]
    return sorted(pairs, key=sum, reverse=True)


def split_scale(x: Tensor, count: int, dtype: torch.dtype, *, may_overflow: bool = True) -> Tensor | None:
    """The power of two [] float32 that `x` is multiplied by before it is split; None where it need not be.

    Rows with an infinite or NaN value do not count: they must not cost the other rows their digits. The scale is 1 when
    all other rows are zeros.

    Args:
        x: [rows, columns], or [rows] with the largest magnitude of each.
        count: as for `split`.
        dtype: as for `split`.
        may_overflow: leave a single piece without a scale. That is right for gradients, where Megatron's loss scaler
            must see an overflow. Nothing looks for one in hidden states.
    """
    if dtype != torch.float16 or x.dtype == dtype or (count == 1 and may_overflow):
        return None
    if x.numel() == 0:
        return x.new_ones(())
    largest = x.abs() if x.dim() == 1 else torch.linalg.vector_norm(x, ord=torch.inf, dim=1)
    amax = torch.where(largest.isfinite(), largest, 0.0).max()
    usable = amax > 0
    _, exponent = torch.frexp(torch.where(usable, amax, torch.ones_like(amax)))
    # A scale beyond 2^126 would make its reciprocal a denormal.
    shift = (SPLIT_EXPONENT - exponent).clamp(-126, 126)
    return torch.where(usable, torch.ldexp(torch.ones_like(amax), shift), torch.ones_like(amax))


def split_torch(x: Tensor, count: int, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, ...]:
    """The definition, in torch operators; arguments as in `split`."""
    rest = x if scale is None else x * scale
    parts = []
    for _ in range(count):
        part = rest.to(dtype)
        wide = part.float()
        rest = torch.where(wide.isfinite(), rest - wide, 0.0)
        parts.append(part)
    return tuple(parts)
