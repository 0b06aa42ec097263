"""How many columns or tokens one product takes."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 8192
"""Terms that one product accumulates when dY is split: vocabulary rows for dX, tokens for dW."""

UNSPLIT_CHUNK = 4 * CHUNK
"""Vocabulary rows at a time when dY is rounded once: the rounding error hides the accumulator's error, and larger
products are faster."""


def even_chunks(length: int, largest: int) -> list[slice]:
    """Cut `length` into slices of nearly equal length; there are none for a length of 0.

    All slices but the last are multiples of 128 where `largest` is 128 or more, because lengths that are not multiples
    of 8 would take cuBLAS off its fast path. No slice is longer than `largest`.
    """
    count = max(1, -(-length // max(1, largest)))
    step = -(-length // count)
    if count > 1 and largest >= 128:
        step = min(-(-step // 128) * 128, largest // 128 * 128)
    return [slice(start, min(start + step, length)) for start in range(0, length, max(step, 1))]


def extended(x: Tensor, more: int, value: int) -> Tensor:
    """`x` [tokens, ...] with so many rows more, filled with a value."""
    return x if more == 0 else torch.cat([x, x.new_full((more, *x.shape[1:]), value)])
