"""Qwen3, dense, alone or as the text model of Qwen3-VL: attention with norms of q and k.

Qwen3-VL adds DeepStack and sections of the rotary angles to its text model. Both concern image tokens only.

Source: transformers `models/qwen3/modeling_qwen3.py`, `models/qwen3_vl/modeling_qwen3_vl.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_fp32.weights import blocks
from megatron_fp32.weights.hf_config.decoder import DecoderConfig, decoder_fields, require, text_config

MODEL_TYPES = ("qwen3", "qwen3_vl_text", "qwen3_vl")

mappings = blocks.decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """The part of a Qwen3 `config.json` that decides shapes and arithmetic."""

    qk_norm: bool = True

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3Config:
        """Read a parsed `config.json`.

        Raises:
            ValueError: for another family, or arithmetic that is not implemented.
        """
        text = text_config(config, "Qwen3", MODEL_TYPES)
        require(text, "Qwen3", hidden_act="silu", attention_bias=False, use_sliding_window=False)
        if "num_key_value_heads" not in text:  # null means num_attention_heads, but transformers has another default
            raise ValueError("config.json lacks num_key_value_heads")
        theta = 1e4 if text["model_type"] == MODEL_TYPES[0] else 5e5
        return cls(**decoder_fields(config, text, ("intermediate_size", "head_dim"), rope_theta=theta))
