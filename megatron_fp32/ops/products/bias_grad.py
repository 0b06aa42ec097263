"""The gradient of a bias: dY summed over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp32.ops.products.split import Pieces


class BiasGrad:
    """dbias of one rank on its way, in fp32: the sum of the dY that dW is made of.

    Args:
        bias: [vocab / tp]; the gradient gets its dtype.
    """

    def __init__(self, bias: Tensor) -> None:
        self._dtype = bias.dtype
        self._sum = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)

    def add_rows(self, rows: slice, grad: Pieces) -> None:
        """Add the terms of some tokens to these elements: [tokens, columns] in pieces, small terms first."""
        total = torch.zeros_like(self._sum[rows])
        for part in reversed(grad.parts):
            total += part.sum(0, dtype=torch.float32)
        self._sum[rows] += total if grad.inverse_scale is None else total * grad.inverse_scale

    def finish(self) -> Tensor:
        """The sum, rounded once."""
        return self._sum.to(self._dtype)
