"""Qwen3.5, dense: layers alternate between gated delta net and gated attention.

Source: transformers `models/qwen3_5/modeling_qwen3_5.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_fp32.weights import blocks
from megatron_fp32.weights.hf_config.decoder import DecoderConfig, decoder_fields, require, text_config
from megatron_fp32.weights.hf_config.sizes import LINEAR_ATTENTION_FIELDS
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.naming import Naming

MODEL_TYPES = ("qwen3_5_text", "qwen3_5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen35Config(DecoderConfig):
    """The part of a Qwen3.5 `config.json` that decides shapes and arithmetic."""

    qk_norm: bool = True
    output_gate: bool = True
    zero_centred_norms: bool = True

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen35Config:
        """Read a parsed `config.json` of the text model, or of the vision-language model around it.

        Raises:
            ValueError: for another family, or arithmetic that is not implemented.
        """
        text = text_config(config, "Qwen3.5", MODEL_TYPES)
        require(text, "Qwen3.5", hidden_act="silu", attention_bias=False, attn_output_gate=True, num_experts=0)
        names = ("num_key_value_heads", "head_dim", "intermediate_size", *LINEAR_ATTENTION_FIELDS)
        return cls(**decoder_fields(config, text, names, partial_rotary_factor=0.25))


def mappings(config: DecoderConfig, naming: Naming) -> Iterator[TensorMapping]:
    """The mappings of every tensor of the model."""
    return blocks.decoder(config, naming, in_proj=blocks.separate_in_proj)
