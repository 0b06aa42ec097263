"""Output layers and models with one, for the tests here, stock and ours."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_fp32.config import Fp32Config
from megatron_fp32.models.provider import cpu_overrides
from megatron_fp32.output_layer.layer import to_fp32_output_layer

HIDDEN, VOCAB, LENGTH = 64, 96, 16
FUSED = [Fp32Config(gated_delta_net=(), fused_loss=way) for way in ("recompute", "saved")]  # type: ignore[arg-type]


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


def scaled_layer(**fields: Any) -> Any:
    """A stock layer that gives logits of about 1 for hidden states of about 1, the same ones in every call."""
    torch.manual_seed(0)
    layer = stock_layer(init_method=torch.nn.init.normal_, **fields)
    with torch.no_grad():
        layer.weight.div_(HIDDEN**0.5)
    return layer


class SoftCapped(ColumnParallelLinear):
    """Its logits are more than a product."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        logits, bias = super().forward(*args, **kwargs)
        return torch.tanh(logits), bias


def gpt(*, tensor: int = 1, mtp: int | None = None, tied: bool = False, **fields: Any) -> Any:
    """megatron-core's GPTModel of one layer in bf16, with the same values in every call."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0, bf16=True,
        params_dtype=torch.bfloat16, mtp_num_layers=mtp, tensor_model_parallel_size=tensor,
        **cpu_overrides(), **fields,
    )  # fmt: skip
    layer = get_gpt_layer_local_spec()
    torch.manual_seed(0)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer,
        mtp_block_spec=get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if mtp else None,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
    )
