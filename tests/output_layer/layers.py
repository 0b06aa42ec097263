"""Output layers for the tests here, stock and ours."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_fp32.config import Fp32Config
from megatron_fp32.output_layer.layer import to_fp32_output_layer

HIDDEN, VOCAB = 64, 96


def stock_layer(cls: type[ColumnParallelLinear] = ColumnParallelLinear, **fields: Any) -> Any:
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, bf16=True, params_dtype=torch.bfloat16
    )
    kwargs = {"config": config, "init_method": torch.nn.init.xavier_normal_, "bias": False, **fields}
    return cls(HIDDEN, VOCAB, **kwargs)


def integers(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape).bfloat16()


def head(fp32: Fp32Config | None = None, **fields: Any) -> Any:
    """An fp32 layer whose weight holds integers, as DistributedDataParallel leaves it."""
    layer = to_fp32_output_layer(stock_layer(**fields), fp32)
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(integers(VOCAB, HIDDEN))
        own_main_grad(layer.weight)
    return layer


def own_main_grad(weight: Any) -> None:
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False


def micro_batch(shape: tuple[int, ...] = (6, 2)) -> tuple[Tensor, Tensor]:
    return integers(*shape, HIDDEN).requires_grad_(), torch.randint(-8, 9, (*shape, VOCAB)).float()
