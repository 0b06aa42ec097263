"""dX: how the chunks of the vocabulary are added up on one rank, and how the ranks' sums are added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.products.chunks import CHUNK, even_chunks
from megatron_fp32.ops.products.gemm import sum_of_products_
from megatron_fp32.ops.products.split import Pieces, small_first, split


class HiddenSum(Protocol):
    """dX of some tokens, while chunks of the vocabulary are added to it."""

    def chunks(self, columns: int, largest: int) -> list[slice]:
        """Every one of `columns` rows of the weight once, at most `largest` at a time, in the order of the sum.

        There is at least one chunk, which may be empty.
        """

    def add(self, columns: slice, grad: Pieces, weight: Tensor) -> None:
        """Add `grad @ weight` of one chunk: [tokens, columns] in pieces, and [columns, hidden]."""

    def finish(self, inverse_scale: Tensor | None) -> None:
        """All chunks were added; `inverse_scale` is the inverse scale of their pieces."""


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
        return even_chunks(columns, largest) or [slice(0, 0)]

    def add(self, columns: slice, grad: Pieces, weight: Tensor) -> None:
        """Small terms first. A float32 weight beside 16-bit pieces is split, some rows at a time."""
        count = len(weight) if self._valid is None else max(0, min(columns.stop, self._valid) - columns.start)
        dtype = grad.parts[0].dtype
        largest = CHUNK if weight.dtype != dtype else count
        for rows in even_chunks(count, largest) or [slice(0, 0)]:
            pieces = split(weight[rows], 3, dtype).parts
            pairs = small_first(len(grad.parts), len(pieces))
            products = ((grad.parts[i][:, rows], pieces[j]) for i, j in pairs)
            sum_of_products_(self._out, products, accumulate=columns.start + rows.start > 0)

    def finish(self, inverse_scale: Tensor | None) -> None:
        """Undo the scale."""
        if inverse_scale is not None:
            self._out.mul_(inverse_scale)


class HiddenGrad:
    """dX on its way: this rank's part in fp32, then the sum over the tensor-parallel ranks.

    Args:
        partial: [tokens, hidden] float32, for this rank's part, which is complete when `start` is called.
        group: the tensor-parallel ranks; None for one.
        scatter: every rank receives the sum of its own tokens (sequence parallel).
        reduce: every rank receives the whole sum.
        valid: how many rows of this rank's weight are not padding; None for all of them.
    """

    def __init__(
        self,
        partial: Tensor,
        *,
        group: dist.ProcessGroup | None,
        scatter: bool,
        reduce: bool,
        valid: int | None = None,
    ) -> None:
        assert not (scatter and reduce)
        self.partial, self._valid = partial, valid
        self._group, self._scatter, self._reduce = group, scatter, reduce
        self._work: dist.Work | None = None

    def of(self, tokens: slice, bounds: Callable[[], Tensor] | None = None) -> HiddenSum:
        """This rank's part for some of the tokens.

        Args:
            tokens: which. A token is asked for once.
            bounds: gives their [tokens] float32, at least the sum of |dY| over the whole vocabulary, to those who need
                to know.
        """
        return ChunkedHiddenSum(self.partial[tokens], valid=self._valid)

    def start(self) -> None:
        """Begin the sum; it overlaps with what is still computed."""
        if self._scatter:
            part, rows = self.partial, self.partial.shape[0] // dist.get_world_size(self._group)
            self.partial = part.new_empty(rows, part.shape[1])
            self._work = dist.reduce_scatter_tensor(self.partial, part, group=self._group, async_op=True)
        elif self._reduce:
            self._work = dist.all_reduce(self.partial, group=self._group, async_op=True)

    def finish(self) -> Tensor:
        """The sum, [tokens, hidden] float32, or [tokens / tp, hidden] after a scatter."""
        if self._work is not None:
            self._work.wait()
        return self.partial
