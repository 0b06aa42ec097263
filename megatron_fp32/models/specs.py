"""Layer specs for Transformer Engine and for the local backend, with one set of checkpoint keys.

megatron-core's block spec for gated-delta-net layers refuses the local backend. Its local specs have neither a
zero-centred norm nor a norm for sequence parallelism. The local spec here has both norms, and the checkpoint keys of
the Transformer Engine spec, so that one checkpoint loads under both specs.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import copy
import dataclasses
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
    get_moe_layer_pattern,
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_fp32.apply import pre_wrap_hook
from megatron_fp32.config import Fp32Config, config_or_default
from megatron_fp32.extras import MissingPackageError, missing
from megatron_fp32.gated_delta_net.layer import VARIANTS, Fp32GatedDeltaNet
from megatron_fp32.gated_delta_net.norm import PreLinearRMSNorm, RMSNorm


def decoder_block_spec(
    config: TransformerConfig,
    fp32: Fp32Config | None = None,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The spec of the decoder, with the layers that `linear_attention_freq` and `moe_layer_freq` describe.

    Args:
        config: its `transformer_impl` chooses the backend, `"transformer_engine"` or `"local"`.
        fp32: which parameters of the gated-delta-net layers are kept; the default keeps `A_log` and `out_norm`.
        vp_stage, pp_rank: the pipeline stage to build.

    Raises:
        ValueError: for another attention variant or backend.
        MissingPackageError: when the configuration needs Transformer Engine, and it is not installed.
    """
    _check(config)
    if config.transformer_impl == "local":
        spec = _local_block_spec(config, vp_stage=vp_stage, pp_rank=pp_rank)
    elif config.experimental_attention_variant is None:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage, pp_rank=pp_rank)
    else:
        spec = get_transformer_block_with_experimental_attention_variant_spec(
            config, vp_stage=vp_stage, pp_rank=pp_rank
        )
    return with_fp32_gated_delta_net(spec, fp32)


def mtp_block_spec(
    config: TransformerConfig, *, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The spec of the MTP layers: full attention, with experts if the decoder has experts.

    megatron-core itself would use the spec of the stage's last layer, which may be a gated delta net.

    Args:
        config: see `decoder_block_spec`; `mtp_num_layers` is the number of MTP layers.
        vp_stage: the virtual pipeline stage.

    Returns:
        None on a stage without MTP layers.

    Raises:
        ValueError: for another attention variant or backend.
    """
    _check(config)
    use_transformer_engine = config.transformer_impl == "transformer_engine"
    if use_transformer_engine:
        (layer,) = decoder_block_spec(_one_attention_layer(config), pp_rank=0).layer_specs
    else:
        layer = _local_layer(config, gated_delta_net=False, moe=config.num_moe_experts is not None)
    block = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=use_transformer_engine, vp_stage=vp_stage)
    if block is not None and not use_transformer_engine:
        for mtp_layer in block.layer_specs:
            mtp_layer.submodules = dataclasses.replace(
                mtp_layer.submodules, enorm=RMSNorm, hnorm=RMSNorm, layer_norm=RMSNorm
            )
    return block


def _check(config: TransformerConfig) -> None:
    variant = config.experimental_attention_variant
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"expected experimental_attention_variant None or 'gated_delta_net', got {variant!r}")
    if config.transformer_impl not in ("transformer_engine", "local"):
        raise ValueError(f"expected transformer_impl 'transformer_engine' or 'local', got {config.transformer_impl!r}")
    # Without Transformer Engine this name is None or missing, and megatron-core would call it.
    if config.transformer_impl == "transformer_engine" and getattr(gpt_layer_specs, "TESpecProvider", None) is None:
        raise MissingPackageError(missing("transformer_engine"), name="transformer_engine")


def _one_attention_layer(config: TransformerConfig) -> TransformerConfig:
    """The configuration of a decoder with one attention layer on one stage, with experts if the decoder has experts."""
    config = copy.copy(config)
    config.num_layers, config.linear_attention_freq, config.moe_layer_freq = 1, [0], 1
    config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size = 1, None
    config.pipeline_model_parallel_layout = None
    config.num_layers_in_first_pipeline_stage = config.num_layers_in_last_pipeline_stage = None
    config.account_for_embedding_in_pipeline_split = config.account_for_loss_in_pipeline_split = False
    return config


def with_fp32_gated_delta_net(
    spec: TransformerBlockSubmodules, fp32: Fp32Config | None = None
) -> TransformerBlockSubmodules:
    """A copy of a block spec in which every `GatedDeltaNet` is an `Fp32GatedDeltaNet`."""
    names = config_or_default(fp32, name="fp32").gated_delta_net
    spec = copy.deepcopy(spec)
    for layer in spec.layer_specs or ():
        attention = layer.submodules.self_attention
        if names and isinstance(attention, ModuleSpec) and attention.module is GatedDeltaNet:
            attention.module = Fp32GatedDeltaNet
            attention.params = {**(attention.params or {}), "fp32_parameters": names}
    return spec


def pretrain_spec(model_config: Any, vp_stage: int | None = None) -> Any:
    """Everything in `Fp32Config()` for an unmodified `pretrain_gpt.py` (megatron-core >= 0.19).

    Pass `--spec megatron_fp32.models.specs pretrain_spec`. Since 0.19 a spec may be a function of the model
    configuration, which Megatron calls for each model chunk. This function returns the spec that Megatron would use
    without `--spec`, with gated-delta-net layers whose parameters stay fp32. For the output layer, it adds `apply_fp32`
    to the configuration's `pre_wrap_hooks`. That hook installs the optimizer repairs, too; `pre_wrap_hook` says how to
    undo them.

    Args:
        model_config: a `megatron.training.models.GPTModelConfig`.
        vp_stage: the virtual pipeline stage.

    Raises:
        TypeError: when `model_config` does not have `pre_wrap_hooks`: in older releases a spec cannot be a function.
    """
    if not isinstance(getattr(model_config, "pre_wrap_hooks", None), list):
        raise TypeError(
            f"expected a model configuration with pre_wrap_hooks (megatron-core >= 0.19), got "
            f"{type(model_config).__name__}; in older releases call apply_fp32 in the model provider"
        )
    # This function is called for each chunk, but one hook handles all chunks. Its mark shows that it is there already.
    if not any(getattr(hook, "is_megatron_fp32", False) for hook in model_config.pre_wrap_hooks):
        model_config.pre_wrap_hooks.insert(0, pre_wrap_hook(weights="initialized"))
    if model_config.transformer.experimental_attention_variant in VARIANTS:
        return decoder_block_spec(model_config.transformer, vp_stage=vp_stage)
    from megatron.training.models.gpt import default_layer_spec

    return default_layer_spec(model_config, vp_stage)


def _local_block_spec(
    config: TransformerConfig, *, vp_stage: int | None, pp_rank: int | None
) -> TransformerBlockSubmodules:
    linear = [0] * config.num_layers
    if config.experimental_attention_variant is not None:
        linear = get_linear_attention_pattern(config)
    moe = get_moe_layer_pattern(config) if config.num_moe_experts is not None else [0] * config.num_layers
    kinds = list(zip(linear, moe, strict=True))
    specs = {kind: _local_layer(config, gated_delta_net=bool(kind[0]), moe=bool(kind[1])) for kind in set(kinds)}
    start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    layers = [specs[kind] for kind in kinds[start : start + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _local_layer(config: TransformerConfig, *, gated_delta_net: bool, moe: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    attention = layer.submodules.self_attention
    if gated_delta_net:
        attention = ModuleSpec(
            module=GatedDeltaNet,
            submodules=GatedDeltaNetSubmodules(
                in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear
            ),
        )
    elif config.qk_layernorm:
        attention.submodules = dataclasses.replace(attention.submodules, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    # Under Transformer Engine each norm belongs to the linear layer after it, except the norm before experts.
    keys = {"input_layernorm.": f"self_attention.{'in_proj' if gated_delta_net else 'linear_qkv'}.layer_norm_"}
    if not moe:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=PreLinearRMSNorm,
        self_attention=attention,
        pre_mlp_layernorm=RMSNorm if moe else PreLinearRMSNorm,
        sharded_state_dict_keys_map=keys,
    )
    return layer
