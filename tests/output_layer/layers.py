"""Output layers and models with one, for the tests here, stock and ours."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
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


def _config(**fields: Any) -> TransformerConfig:
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 4}
    sizes.update(hidden_dropout=0.0, attention_dropout=0.0)
    return TransformerConfig(bf16=True, params_dtype=torch.bfloat16, **{**cpu_overrides(), **sizes, **fields})


def gpt(
    *, tensor: int = 1, context: int = 1, mtp: int | None = None, tied: bool = False, attention: bool = True,
    **fields: Any,
) -> Any:  # fmt: skip
    """megatron-core's GPTModel of one layer in bf16, with the same values in every call.

    Without attention, it supports context parallelism and packed sequences, which megatron-core's attention on the CPU
    does not.
    """
    build = {name: fields.pop(name) for name in ("pre_process", "post_process") if name in fields}
    config = _config(mtp_num_layers=mtp, tensor_model_parallel_size=tensor, context_parallel_size=context, **fields)
    layer = get_gpt_layer_local_spec()
    if not attention:
        nothing = ModuleSpec(module=IdentityOp, params={"attn_mask_type": AttnMaskType.causal})
        layer.submodules = dataclasses.replace(
            layer.submodules, input_layernorm=IdentityOp, self_attention=nothing, self_attn_bda=IdentityFuncOp
        )
    torch.manual_seed(0)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer,
        mtp_block_spec=get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if mtp else None,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope" if attention else "none",
        **build,
    )


def hybrid() -> Any:
    """megatron-core's HybridModel of one attention layer in bf16; before 0.18, its MambaModel."""
    attention = get_gpt_layer_local_spec()
    try:
        from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack
        from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as Submodules
        from megatron.core.models.hybrid.hybrid_model import HybridModel as Model
    except ImportError:  # megatron-core < 0.18
        from megatron.core.models.mamba import MambaModel as Model
        from megatron.core.ssm.mamba_block import MambaStack as Stack
        from megatron.core.ssm.mamba_block import MambaStackSubmodules as Submodules
    parameters = inspect.signature(Model).parameters
    spec = next(name for name in ("hybrid_stack_spec", "mamba_stack_spec") if name in parameters)
    pattern = next(name for name in ("hybrid_layer_pattern", "hybrid_override_pattern") if name in parameters)
    stack = ModuleSpec(
        module=Stack, params={"post_layer_norm": False}, submodules=Submodules(attention_layer=attention)
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "max_sequence_length": LENGTH}
    return Model(config=_config(), **sizes, **{spec: stack, pattern: "*"})


def inputs(labels: bool = True) -> dict[str, Any]:
    """A micro-batch of two sequences, as arguments of the models; its labels are the next tokens."""
    torch.manual_seed(3)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(LENGTH).expand(2, LENGTH),
        "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1),
        "labels": tokens.roll(-1, 1) if labels else None,
    }


def fill(model: Any) -> None:
    """Give matrices random values, the same ones in every call, and on every tensor-parallel rank."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
