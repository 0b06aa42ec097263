"""Qwen3.5 with a mixture of experts in every layer, and a shared expert with a gate.

Released checkpoints store fused experts. Checkpoints with one tensor for each expert can be read, too.

Source: transformers `models/qwen3_5_moe/modeling_qwen3_5_moe.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_fp32.weights.families import qwen3_5
from megatron_fp32.weights.hf_config.decoder import decoder_fields, require, require_parts, text_config
from megatron_fp32.weights.hf_config.sizes import LINEAR_ATTENTION_FIELDS, MOE_FIELDS

MODEL_TYPES = ("qwen3_5_moe_text", "qwen3_5_moe")

mappings = qwen3_5.mappings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen35MoeConfig(qwen3_5.Qwen35Config):
    """The part of a Qwen3.5-MoE `config.json` that decides shapes and arithmetic."""

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen35MoeConfig:
        """Read a parsed `config.json` of the text model, or of the vision-language model around it.

        Raises:
            ValueError: for another family, or arithmetic that is not implemented.
        """
        text = text_config(config, "Qwen3.5-MoE", MODEL_TYPES)
        require(text, "Qwen3.5-MoE", hidden_act="silu", attention_bias=False, attn_output_gate=True)
        require_parts(text, "Qwen3.5-MoE", "num_experts", "shared_expert_intermediate_size")
        names = (
            "num_key_value_heads",
            "head_dim",
            *LINEAR_ATTENTION_FIELDS,
            *MOE_FIELDS,
            "shared_expert_intermediate_size",
        )
        return cls(**decoder_fields(config, text, names, partial_rotary_factor=0.25))
