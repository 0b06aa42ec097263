"""fp32 where it decides the result, in models that otherwise run in bf16 on Megatron-core."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_fp32.apply import apply_fp32
    from megatron_fp32.check import check_fp32
    from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
    from megatron_fp32.config import Fp32Config
    from megatron_fp32.models.provider import model_provider
    from megatron_fp32.ops.logits import fp32_logits
    from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
    from megatron_fp32.ssm.gated_delta_net import Fp32GatedDeltaNet
    from megatron_fp32.tensor_parallel.output_layer import Fp32OutputLayer, to_fp32_output_layer
    from megatron_fp32.transformer.keep_in_fp32 import keep_in_fp32

__all__ = [
    "Fp32Config",
    "Fp32GatedDeltaNet",
    "Fp32OutputLayer",
    "apply_fp32",
    "check_fp32",
    "export_checkpoint",
    "fp32_logits",
    "import_checkpoint",
    "install_optimizer_repairs",
    "keep_in_fp32",
    "model_provider",
    "to_fp32_output_layer",
]

# Resolved on first use: half of these need megatron-core, and the others must work without it.
_HOMES = {
    "Fp32Config": "config",
    "Fp32GatedDeltaNet": "ssm.gated_delta_net",
    "Fp32OutputLayer": "tensor_parallel.output_layer",
    "apply_fp32": "apply",
    "check_fp32": "check",
    "export_checkpoint": "checkpoint.convert",
    "fp32_logits": "ops.logits",
    "import_checkpoint": "checkpoint.convert",
    "install_optimizer_repairs": "optimizer.native_fp32",
    "keep_in_fp32": "transformer.keep_in_fp32",
    "model_provider": "models.provider",
    "to_fp32_output_layer": "tensor_parallel.output_layer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
