"""The one gather that the operators need."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def gather_first_dim(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[tp * s, ...] of every rank's [s, ...]."""
    gathered = tensor.new_empty(tensor.shape[0] * dist.get_world_size(group), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered
