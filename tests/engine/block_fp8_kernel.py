"""A vLLM plugin: block FP8 on any CPU. vLLM's own kernel needs AMX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register() -> None:
    """Put a kernel that dequantizes before vLLM's own, so that results do not depend on what the CPU has."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    class DequantizeBlocks(Fp8BlockScaledMMLinearKernel):
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            """The weight stays as it was loaded."""

        def apply_block_scaled_mm(self, *args: Any, **kwargs: Any) -> Tensor:
            raise NotImplementedError

        def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
            parameters = self._get_layer_params(layer)
            weight, (rows, columns) = parameters.weight, self.weight_group_shape
            scale = parameters.block_scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            scale = scale[: weight.shape[0], : weight.shape[1]]
            return torch.nn.functional.linear(x, (weight.float() * scale).to(x.dtype), bias)

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if not any(kernel.__name__ == DequantizeBlocks.__name__ for kernel in kernels):
        kernels.insert(0, DequantizeBlocks)
