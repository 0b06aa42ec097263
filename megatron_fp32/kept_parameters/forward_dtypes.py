"""Which parameters the forward pass and the initialization of a layer can use in fp32.

Layers are recognised by the name of megatron-core's class, so that this module does not import Megatron.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

GATED_DELTA_NET_FP32_PARAMETERS = ("A_log", "dt_bias", "out_norm.weight")
"""Parameters of megatron-core's GatedDeltaNet that may be fp32 when the hidden states have 16 bits.

The projections and the convolution multiply a parameter with 16-bit activations, and refuse operands of two dtypes.
"""


def check_forward(module: nn.Module, name: str) -> None:
    """Raise ValueError if a layer cannot run with the parameter `name` of `module` in fp32."""
    parts = name.split(".")
    for depth in range(len(parts)):
        layer = module.get_submodule(".".join(parts[:depth]))
        relative = ".".join(parts[depth:])
        allowed = GATED_DELTA_NET_FP32_PARAMETERS
        if is_gated_delta_net(layer) and relative not in allowed and not _is_fp32(layer):
            raise ValueError(
                f"{relative!r} of a GatedDeltaNet cannot be kept in fp32: the forward pass multiplies it with 16-bit "
                f"activations, which fails for two dtypes. Parameters that can be kept are {', '.join(allowed)}"
            )


def note_on_forward(owner: nn.Module, leaf: str) -> str | None:
    """Why keeping this parameter in fp32 has less effect than it seems; None if it has its full effect."""
    router = _is_megatron(owner, "Router", "megatron.core.transformer.moe.router") and leaf in ("weight", "bias")
    if router and getattr(owner.config, "moe_router_dtype", None) is None and not _is_fp32(owner):
        return (
            "without moe_router_dtype, the router casts this parameter to the 16-bit dtype of its input in every "
            "forward pass; set moe_router_dtype='fp32' to route with the fp32 values"
        )
    return None


@contextlib.contextmanager
def reset_in_params_dtype(layer: Any) -> Iterator[None]:
    """Give `dt_bias` of a GatedDeltaNet `params_dtype` inside the block, because its `reset_parameters` needs that.

    After the block, `dt_bias` has its own tensor and dtype again, with the values that the block wrote.
    """
    own = layer.dt_bias.data if is_gated_delta_net(layer) else None
    if own is None or own.dtype == layer.config.params_dtype:
        yield
        return
    try:
        layer.dt_bias.data = own.to(layer.config.params_dtype)
        yield
        own.copy_(layer.dt_bias.data)
    finally:
        layer.dt_bias.data = own


def is_gated_delta_net(module: nn.Module) -> bool:
    """Whether the module is megatron-core's GatedDeltaNet, or an instance of a subclass."""
    return _is_megatron(module, "GatedDeltaNet", "megatron.core.ssm.gated_delta_net")


def _is_megatron(module: nn.Module, name: str, package: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith(package) for cls in type(module).__mro__)


def _is_fp32(layer: Any) -> bool:
    config = layer.config
    return config.params_dtype == torch.float32 and not (config.bf16 or config.fp16)
