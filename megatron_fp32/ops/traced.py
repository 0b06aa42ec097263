"""Whether a compiler or FakeTensor looks, in place of a device that computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_traced(tensor: Tensor) -> bool:
    """Whether values and addresses of this tensor are unknown."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)
