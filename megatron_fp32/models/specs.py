"""Layer specs for models with gated-delta-net layers, under Transformer Engine and under the local backend.

megatron-core's own `get_transformer_block_with_experimental_attention_variant_spec` refuses the local backend. The one
here builds it with the checkpoint keys of the Transformer Engine spec, so that one checkpoint loads under both.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_fp32.apply import pre_wrap_hook
from megatron_fp32.config import Fp32Config
from megatron_fp32.ssm.gated_delta_net import VARIANTS, Fp32GatedDeltaNet
from megatron_fp32.transformer.norm import PreLinearRMSNorm, RMSNorm


def gated_delta_net_block_spec(
    config: TransformerConfig,
    fp32: Fp32Config | None = None,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The decoder's spec: gated delta net and gated attention in the order that `config.linear_attention_freq` says.

    Args:
        config: `transformer_impl` chooses the backend, `"transformer_engine"` or `"local"`.
        fp32: which parameters of the gated-delta-net layers are kept; the default keeps `A_log` and `out_norm`.
        vp_stage, pp_rank: the pipeline stage to build for.

    Raises:
        ValueError: for a configuration that has no gated-delta-net layers, or another backend.
    """
    if config.experimental_attention_variant not in VARIANTS:
        raise ValueError(
            f"expected experimental_attention_variant 'gated_delta_net', got {config.experimental_attention_variant!r}"
        )
    if config.transformer_impl == "transformer_engine":
        spec = get_transformer_block_with_experimental_attention_variant_spec(
            config, vp_stage=vp_stage, pp_rank=pp_rank
        )
    elif config.transformer_impl == "local":
        spec = _local_block_spec(config, vp_stage=vp_stage, pp_rank=pp_rank)
    else:
        raise ValueError(f"expected transformer_impl 'transformer_engine' or 'local', got {config.transformer_impl!r}")
    return with_fp32_gated_delta_net(spec, fp32)


def with_fp32_gated_delta_net(
    spec: TransformerBlockSubmodules, fp32: Fp32Config | None = None
) -> TransformerBlockSubmodules:
    """A copy of a block spec in which every `GatedDeltaNet` is an `Fp32GatedDeltaNet`."""
    names = (fp32 or Fp32Config()).gated_delta_net
    spec = copy.deepcopy(spec)
    for layer in spec.layer_specs or ():
        attention = layer.submodules.self_attention
        if names and isinstance(attention, ModuleSpec) and attention.module is GatedDeltaNet:
            attention.module = Fp32GatedDeltaNet
            attention.params = {**(attention.params or {}), "fp32_parameters": names}
    return spec


def pretrain_spec(model_config: Any, vp_stage: int | None = None) -> Any:
    """For `--spec megatron_fp32.models.specs pretrain_spec` of an unmodified `pretrain_gpt.py` (megatron-core >= 0.19).

    There a spec may be a function of the model configuration, which is called as each chunk is built. This one returns
    the spec that would have been taken without `--spec`, with gated-delta-net layers whose parameters stay fp32, and
    adds `apply_fp32` to the configuration's `pre_wrap_hooks`, for the output layer: everything in `Fp32Config()`.

    Args:
        model_config: `megatron.training.models.GPTModelConfig`.
        vp_stage: the virtual pipeline stage.

    Raises:
        TypeError: when this is no such configuration: earlier releases take no function for a spec.
    """
    if not isinstance(getattr(model_config, "pre_wrap_hooks", None), list):
        raise TypeError(
            f"expected a model configuration with pre_wrap_hooks (megatron-core >= 0.19), got "
            f"{type(model_config).__name__}; elsewhere call apply_fp32 in the model provider"
        )
    # Called for each chunk; the hook is for all of them. It is found again by its mark, not kept in a global.
    if not any(getattr(hook, "is_megatron_fp32", False) for hook in model_config.pre_wrap_hooks):
        model_config.pre_wrap_hooks.insert(0, pre_wrap_hook())
    if model_config.transformer.experimental_attention_variant in VARIANTS:
        return gated_delta_net_block_spec(model_config.transformer, vp_stage=vp_stage)
    from megatron.training.models.gpt import default_layer_spec

    return default_layer_spec(model_config, vp_stage)


def _local_block_spec(
    config: TransformerConfig, *, vp_stage: int | None, pp_rank: int | None
) -> TransformerBlockSubmodules:
    if config.num_moe_experts is not None:
        raise ValueError("the local spec has no mixture of experts; use transformer_impl='transformer_engine'")
    attention = _local_attention_layer(config)
    gated_delta_net = _local_gated_delta_net_layer(attention.submodules.mlp)
    layers = [gated_delta_net if kind else attention for kind in get_linear_attention_pattern(config)]
    start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=layers[start : start + count], layer_norm=RMSNorm)


def _local_attention_layer(config: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    if config.qk_layernorm:
        attention = layer.submodules.self_attention
        attention.submodules = dataclasses.replace(attention.submodules, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    layer.submodules = dataclasses.replace(
        layer.submodules, input_layernorm=PreLinearRMSNorm, pre_mlp_layernorm=PreLinearRMSNorm
    )
    return layer


def _local_gated_delta_net_layer(mlp: Any) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=PreLinearRMSNorm,
            self_attention=ModuleSpec(
                module=GatedDeltaNet,
                submodules=GatedDeltaNetSubmodules(
                    in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=PreLinearRMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.in_proj.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
