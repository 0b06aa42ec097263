"""Refuses vocabulary shards of different sizes.

A rank's first column is its rank times its own number of rows. Where ranks have different numbers, as after
`Tensor.chunk` or `DTensor.to_local`, log-probs would be of other tokens, and ranks would not agree on the sizes of what
they exchange.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.ranks import gather_first_dim

_KNOWN = "_megatron_fp32_even_over"
"""The attribute of a weight whose number of rows was compared: the name of the group, and the number."""


@torch.compiler.disable
def check_even_shards(weight: Tensor, group: dist.ProcessGroup | None) -> None:
    """Compare the numbers of rows of all ranks' weights. Every rank takes part in every call.

    On CUDA the host waits for the device, once for each weight and group: the answer is remembered on the weight. While
    a CUDA graph is captured it cannot wait, and relies on the calls before.

    Args:
        weight: this rank's rows.
        group: the tensor-parallel ranks; None for one.

    Raises:
        ValueError: on every rank, where the numbers differ.
    """
    if group is None:
        return
    rows = weight.shape[0]
    every = gather_first_dim(torch.full((1,), rows, dtype=torch.int64, device=weight.device), group)
    known = (group.group_name, rows)
    if getattr(weight, _KNOWN, None) == known or _is_capturing(weight):
        return
    numbers = every.tolist()
    if any(number != rows for number in numbers):
        raise ValueError(
            f"expected a weight with equally many rows on every rank of tp_group, got {numbers} rows: pad the "
            "vocabulary to a multiple of the number of ranks, and pass its real size as vocab_size"
        )
    setattr(weight, _KNOWN, known)


def _is_capturing(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):
        return torch.cuda.is_current_stream_capturing()
