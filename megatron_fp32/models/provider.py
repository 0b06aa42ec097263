"""Build a model from a Hugging Face `config.json`, for a Megatron script or a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_fp32.config import Fp32Config
from megatron_fp32.models.qwen3_5 import Qwen35Config
from megatron_fp32.models.specs import gated_delta_net_block_spec
from megatron_fp32.tensor_parallel.fused_loss import set_fused_loss
from megatron_fp32.tensor_parallel.output_layer import to_fp32_output_layer


def read_hf_config(hf_dir: str | Path) -> Qwen35Config:
    """The `config.json` in a directory, as a family's configuration.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: for a family or a variant that is not supported.
    """
    return Qwen35Config.from_hf(json.loads((Path(hf_dir) / "config.json").read_text()))


def transformer_config(model: Qwen35Config, **overrides: Any) -> TransformerConfig:
    """megatron-core's configuration of a Qwen3.5 model.

    Args:
        model: the shapes.
        overrides: fields of `TransformerConfig`, such as `tensor_model_parallel_size`, `sequence_parallel`, `bf16`,
            `params_dtype` and `transformer_impl`. They win over what the model says.
    """
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "layernorm_zero_centered_gamma": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "qk_layernorm": True,
        "attention_output_gate": True,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": model.linear_attention_pattern,
        "linear_conv_kernel_dim": model.linear_conv_kernel_dim,
        "linear_key_head_dim": model.linear_key_head_dim,
        "linear_value_head_dim": model.linear_value_head_dim,
        "linear_num_key_heads": model.linear_num_key_heads,
        "linear_num_value_heads": model.linear_num_value_heads,
        "hetereogenous_dist_checkpoint": True,
    }
    return TransformerConfig(**{**fields, **overrides})


def cpu_overrides() -> dict[str, Any]:
    """Overrides of `transformer_config` for `testing.cpu`: the local backend, torch operators only, no fusion."""
    return {
        "transformer_impl": "local",
        "deterministic_mode": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }


def padded_vocab_size(vocab_size: int, tensor_parallel: int, *, divisible_by: int = 128) -> int:
    """Rows of the embedding: the next multiple of `divisible_by * tensor_parallel`, as Megatron pads."""
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def build_qwen3_5(
    model: Qwen35Config,
    config: TransformerConfig,
    fp32: Fp32Config | None = None,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    max_sequence_length: int = 4096,
    parallel_output: bool = True,
    vocab_divisible_by: int = 128,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """A `GPTModel`, not yet wrapped, with what `fp32` says in fp32.

    Args:
        model: shapes and rotary embedding.
        config: from `transformer_config`.
        fp32: what to keep in fp32.
        pre_process, post_process, vp_stage: the pipeline stage, as in megatron-core.
        parallel_output: leave the logits vocab-parallel.
        vocab_divisible_by: see `padded_vocab_size`.
        pg_collection: process groups; None takes megatron-core's global ones.
    """
    fp32 = fp32 or Fp32Config()
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=gated_delta_net_block_spec(config, fp32, vp_stage=vp_stage),
        vocab_size=padded_vocab_size(
            model.vocab_size, config.tensor_model_parallel_size, divisible_by=vocab_divisible_by
        ),
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_percent=model.partial_rotary_factor,
        rotary_base=model.rope_theta,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    if post_process and fp32.logits:
        to_fp32_output_layer(gpt.output_layer, fp32)
        set_fused_loss(gpt, fp32)
    return gpt


def model_provider(hf_dir: str | Path, *, fp32: Fp32Config | None = None, **overrides: Any) -> Any:
    """A provider with Megatron's signature: `provider(pre_process, post_process, vp_stage, config, pg_collection)`.

    The last three are optional; `config`, which newer releases may give, wins over `overrides`.

    Args:
        hf_dir: directory with the model's `config.json`.
        fp32: what to keep in fp32.
        overrides: fields of `TransformerConfig`; see `transformer_config`.
    """
    model = read_hf_config(hf_dir)
    dtype = torch.bfloat16 if overrides.get("bf16") else torch.float16 if overrides.get("fp16") else torch.float32
    overrides = {"params_dtype": dtype, **overrides}

    def provider(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> GPTModel:
        return build_qwen3_5(
            model,
            config if config is not None else transformer_config(model, **overrides),
            fp32,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )

    return provider
