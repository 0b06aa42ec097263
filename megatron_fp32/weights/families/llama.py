"""Llama 3: attention and MLP without biases, and the rotary frequencies of Llama 3.1 and later.

Source: transformers `models/llama/modeling_llama.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_fp32.weights import blocks
from megatron_fp32.weights.hf_config.decoder import DecoderConfig, decoder_fields, require, text_config

MODEL_TYPES = ("llama",)

mappings = blocks.decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The part of a Llama `config.json` that decides shapes and arithmetic."""

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """Read a parsed `config.json`.

        Raises:
            ValueError: for another family, or arithmetic that is not implemented.
        """
        text = text_config(config, "Llama", MODEL_TYPES)
        rope_types = ("default", "llama3")
        require(text, "Llama", rope_types=rope_types, hidden_act="silu", attention_bias=False, mlp_bias=False)
        hidden, heads = text.get("hidden_size") or 0, text.get("num_attention_heads") or 1
        if hidden % heads:
            raise ValueError(f"Llama: hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        return cls(**decoder_fields(config, text, ("intermediate_size",)))
