"""Gated-delta-net layers for the tests here, stock and ours, with the same submodules."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_fp32.gated_delta_net.norm import RMSNorm
from megatron_fp32.models.provider import cpu_overrides, transformer_config
from tests.qwen3_5 import tiny_qwen3_5

MODEL = tiny_qwen3_5()


def build(cls: type[GatedDeltaNet], *, params_dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Any:
    """A layer of `MODEL`; keyword arguments of `TransformerConfig` go under `config`, the norm under `out_norm`."""
    fields, out_norm = kwargs.pop("config", {}), kwargs.pop("out_norm", RMSNorm)
    config = transformer_config(
        MODEL, **{**cpu_overrides(), "params_dtype": params_dtype, "bf16": params_dtype == torch.bfloat16, **fields}
    )
    return cls(
        config,
        GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=out_norm, out_proj=RowParallelLinear),
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        **kwargs,
    )


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """fp32 values for every parameter of an unsharded layer."""
    torch.manual_seed(seed)
    hidden, keys, values, heads = MODEL.hidden_size, MODEL.key_dim, MODEL.value_dim, MODEL.linear_num_value_heads
    shapes = {
        "in_proj.weight": (2 * keys + 2 * values + 2 * heads, hidden),
        "conv1d.weight": (2 * keys + values, 1, MODEL.linear_conv_kernel_dim),
        "out_proj.weight": (hidden, values),
        "dt_bias": (heads,),
        "out_norm.weight": (MODEL.linear_value_head_dim,),
    }
    weights = {name: torch.randn(shape) / max(1.0, shape[-1] ** 0.5) for name, shape in shapes.items()}
    return {**weights, "A_log": torch.empty(heads).uniform_(1, 16).log()}


def shard(weights: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What a tensor-parallel rank holds: its heads of every section of `in_proj` and `conv1d`."""
    keys, values, heads = MODEL.key_dim, MODEL.value_dim, MODEL.linear_num_value_heads

    def sections(tensor: Tensor, *sizes: int) -> Tensor:
        return torch.cat([part.chunk(world)[rank] for part in tensor.split(sizes)])

    return {
        "in_proj.weight": sections(weights["in_proj.weight"], keys, keys, values, values, heads, heads),
        "conv1d.weight": sections(weights["conv1d.weight"], keys, keys, values),
        "out_proj.weight": weights["out_proj.weight"].chunk(world, 1)[rank],
        "dt_bias": weights["dt_bias"].chunk(world)[rank],
        "A_log": weights["A_log"].chunk(world)[rank],
        "out_norm.weight": weights["out_norm.weight"],
    }


def load(layer: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy values into every parameter of a layer."""
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
