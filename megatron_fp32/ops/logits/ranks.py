"""What the output layer sends between tensor-parallel ranks: hidden states going in, their gradient coming out."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.products import ChunkedHiddenSum, HiddenSum


def gather_first_dim(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[tp * s, ...] of every rank's [s, ...]."""
    gathered = tensor.new_empty(tensor.shape[0] * dist.get_world_size(group), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered


class HiddenGrad:
    """dX on its way: this rank's part in fp32, then the sum over the ranks.

    Args:
        partial: [tokens, hidden] float32, for this rank's part, which is complete when `start` is called.
        group: the tensor-parallel ranks; None for one.
        scatter: every rank receives the sum of its own tokens (sequence parallel).
        reduce: every rank receives the whole sum.
        valid: rows of this rank's weight that are no padding; None for all of them.
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
            tokens: which; nobody asks for one twice.
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
