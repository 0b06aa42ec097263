"""Stored logits [..., columns] as rows [tokens, columns], in whatever order they lie in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class StoredRows:
    """The rows of logits, in the order of their place in memory.

    Megatron's logits [tokens, batch, columns] are used as [batch, tokens, columns]: their rows are dense in memory, but
    not in the order of the shape. `reshape` would copy all of them. Here their rows are numbered in the order of
    memory, and everything that belongs to tokens is brought into this order. Rows that are not dense in any order are
    copied a chunk at a time.

    Args:
        logits: [..., columns].
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.detach()
        strides = logits.stride()
        self._order = sorted(range(logits.dim() - 1), key=lambda dim: -strides[dim])
        self._ordered = self._logits.permute(*self._order, -1)
        *self._shape, self.columns = self._ordered.shape
        self.tokens = math.prod(self._shape)
        self.is_cuda = logits.is_cuda
        self._rows = self._view()

    def _view(self) -> Tensor | None:
        if self._logits.stride(-1) != 1 and self.columns > 1:
            return None
        try:
            return self._ordered.view(self.tokens, self.columns)
        except RuntimeError:
            return None

    @property
    def copied(self) -> bool:
        """Whether every chunk of rows is a copy."""
        return self._rows is None

    @property
    def writable(self) -> bool:
        """Whether every element is in a place of its own, which a chunk of rows shows."""
        return self._rows is not None and (self.tokens < 2 or self._rows.stride(0) >= self.columns)

    def __getitem__(self, chunk: slice) -> Tensor:
        """[tokens, columns] of some of the rows, dense in their last dimension."""
        if self._rows is not None:
            return self._rows[chunk]
        rest = torch.arange(chunk.start, chunk.stop, device=self._logits.device)
        indices = []
        for size in reversed(self._shape):
            indices.append(rest % size)
            rest = rest // size
        return self._ordered[tuple(reversed(indices))].contiguous()

    def flatten(self, of_tokens: Tensor) -> Tensor:
        """[tokens] of a tensor in the logits' leading shape."""
        return of_tokens.permute(self._order).reshape(-1)

    def unflatten(self, values: Tensor) -> Tensor:
        """A new tensor in the logits' leading shape, from one [tokens]."""
        shape = self._logits.shape[:-1]
        out = torch.empty(shape, dtype=values.dtype, device=values.device)
        out.permute(self._order).copy_(values.view(self._shape))
        return out

    def like(self) -> tuple[Tensor, Tensor]:
        """Room for a gradient: as the logits, and as rows [tokens, columns] of the same memory."""
        rows = torch.empty(self.tokens, self.columns, dtype=self._logits.dtype, device=self._logits.device)
        back = [self._order.index(dim) for dim in range(len(self._order))]
        return rows.view(*self._shape, self.columns).permute(*back, -1), rows

    def in_place(self) -> tuple[Tensor, Tensor]:
        """The logits' own memory, in the same two forms; `writable` must hold."""
        assert self._rows is not None
        assert self.writable
        return self._logits, self._rows
