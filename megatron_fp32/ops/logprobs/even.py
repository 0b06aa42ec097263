"""Refuses vocabulary shards of different sizes.

A rank's first column is its rank times its own number of rows. Where ranks have different numbers, as after
`Tensor.chunk` or `DTensor.to_local`, log-probs would be of other tokens. So every call compares them: one number of
each rank, in a collective of its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.ranks import gather_first_dim


class EvenShards:
    """Whether all ranks have equally many rows of the weight.

    On the CPU it is known, and raised, at once and on every rank. On CUDA the host would have to wait for the device:
    there `poison` makes all results NaN, and the backward pass, which comes when the answer has long arrived, raises.

    Args:
        rows: of this rank's weight.
        group: the tensor-parallel ranks; None for one.
        device: of the weight.

    Raises:
        ValueError: on the CPU, where the numbers differ.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._even: Tensor | None = None
        self._answer: Tensor | None = None
        if group is None:
            return
        every = gather_first_dim(torch.full((1,), rows, dtype=torch.int64, device=device), group)
        if device.type != "cuda":
            _raise_unless_even(every)
            return
        self._even = (every == rows).all()
        if torch.cuda.is_current_stream_capturing():
            return
        self._answer = torch.empty(every.shape, dtype=torch.int64, pin_memory=True)
        self._answer.copy_(every, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def poison(self, inverse_temperature: Tensor) -> Tensor:
        """The inverse temperatures [tokens], NaN for all tokens where the numbers differ."""
        if self._even is None:
            return inverse_temperature
        return torch.where(self._even, inverse_temperature, torch.nan)

    def check(self) -> None:
        """Raise ValueError where the numbers differ."""
        if self._answer is not None:
            self._arrived.synchronize()
            _raise_unless_even(self._answer)


@torch.compiler.disable
def compare_shards(rows: int, group: dist.ProcessGroup | None, device: torch.device) -> EvenShards:
    """`EvenShards` outside of what a compiler traces."""
    return EvenShards(rows, group, device)


def _raise_unless_even(rows: Tensor) -> None:
    if (rows != rows[0]).any():
        raise ValueError(
            f"expected a weight with equally many rows on every rank of tp_group, got {rows.tolist()} rows: pad the "
            "vocabulary to a multiple of the number of ranks, and pass its real size as vocab_size"
        )
