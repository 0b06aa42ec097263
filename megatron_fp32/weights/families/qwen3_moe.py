"""Qwen3 with a mixture of experts, alone or as the text model of Qwen3-VL. No shared expert; layers may be dense.

Source: transformers `models/qwen3_moe/modeling_qwen3_moe.py`, `models/qwen3_vl_moe/modeling_qwen3_vl_moe.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_fp32.weights import blocks
from megatron_fp32.weights.hf_config.decoder import DecoderConfig, decoder_fields, dense_layers, require, text_config
from megatron_fp32.weights.hf_config.sizes import MOE_FIELDS

MODEL_TYPES = ("qwen3_moe", "qwen3_vl_moe_text", "qwen3_vl_moe")

mappings = blocks.decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    """The part of a Qwen3-MoE `config.json` that decides shapes and arithmetic."""

    qk_norm: bool = True

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3MoeConfig:
        """Read a parsed `config.json`.

        Raises:
            ValueError: for another family, or arithmetic that is not implemented.
        """
        text = text_config(config, "Qwen3-MoE", MODEL_TYPES)
        require(text, "Qwen3-MoE", hidden_act="silu", attention_bias=False, use_sliding_window=False)
        theta = 1e4 if text["model_type"] == MODEL_TYPES[0] else 5e5
        if text["model_type"] != MODEL_TYPES[0]:  # Qwen3-VL's router always normalizes
            require(text, "Qwen3-VL-MoE", norm_topk_prob=True)
            text = {**text, "norm_topk_prob": True}
        if "num_local_experts" in text:  # transformers 5 saves num_experts under this name
            text = {**text, "num_experts": text["num_local_experts"]}
        names = ("num_key_value_heads", "intermediate_size", *MOE_FIELDS, "norm_topk_prob")
        return cls(**decoder_fields(config, text, names, rope_theta=theta), dense_layers=dense_layers(text))
