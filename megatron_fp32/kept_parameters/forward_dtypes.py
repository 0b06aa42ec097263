"""Which parameters a layer can use in fp32: what its forward pass takes, and what its initialization takes.

Layers are recognised by the name of megatron-core's class, so that nothing here imports Megatron.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

GATED_DELTA_NET_TAKES = ("A_log", "dt_bias", "out_norm.weight")
"""Parameters of megatron-core's GatedDeltaNet that its forward pass takes in fp32 beside 16-bit hidden states.

The projections and the convolution multiply a parameter with 16-bit activations, and refuse operands of two dtypes.
"""


def check_forward(module: nn.Module, name: str) -> None:
    """Raise ValueError when a layer that contains the parameter `name` cannot run with it in fp32."""
    parts = name.split(".")
    for depth in range(len(parts)):
        layer = module.get_submodule(".".join(parts[:depth]))
        relative = ".".join(parts[depth:])
        if is_gated_delta_net(layer) and relative not in GATED_DELTA_NET_TAKES and not _is_fp32(layer):
            raise ValueError(
                f"{relative!r} of a GatedDeltaNet cannot be kept in fp32: its forward pass multiplies it with 16-bit "
                f"activations, which fails for two dtypes. It takes {', '.join(GATED_DELTA_NET_TAKES)} in fp32"
            )


def note_on_forward(owner: nn.Module, leaf: str) -> str | None:
    """Why an fp32 parameter has less effect than it seems; None when there is nothing to say."""
    router = _is_megatron(owner, "Router", "megatron.core.transformer.moe.router") and leaf in ("weight", "bias")
    if router and getattr(owner.config, "moe_router_dtype", None) is None and not _is_fp32(owner):
        return (
            "without moe_router_dtype the router casts it to the dtype of its input, 16 bits, in every forward pass; "
            "set moe_router_dtype='fp32' to route with it as it is"
        )
    return None


@contextlib.contextmanager
def reset_in_params_dtype(layer: Any) -> Iterator[None]:
    """Inside the block, `dt_bias` of a GatedDeltaNet has `params_dtype`, which its `reset_parameters` demands of it.

    After the block it is the same tensor as before, in its own dtype, with the values that were written.
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
    """Whether this is megatron-core's GatedDeltaNet, or derived from it."""
    return _is_megatron(module, "GatedDeltaNet", "megatron.core.ssm.gated_delta_net")


def _is_megatron(module: nn.Module, name: str, package: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith(package) for cls in type(module).__mro__)


def _is_fp32(layer: Any) -> bool:
    config = layer.config
    return config.params_dtype == torch.float32 and not (config.bf16 or config.fp16)
