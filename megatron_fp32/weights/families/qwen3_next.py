"""Qwen3-Next: gated delta net and gated attention, a mixture of experts, and a shared expert with a gate.

The input projections of a gated delta net are stored by key head. Released checkpoints have one tensor for each expert.

Source: transformers `models/qwen3_next/modeling_qwen3_next.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_fp32.weights import blocks
from megatron_fp32.weights.hf_config.decoder import (
    DecoderConfig,
    decoder_fields,
    dense_layers,
    require,
    require_parts,
    text_config,
)
from megatron_fp32.weights.hf_config.sizes import LINEAR_ATTENTION_FIELDS, MOE_FIELDS
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.naming import Naming

MODEL_TYPES = ("qwen3_next",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(DecoderConfig):
    """The part of a Qwen3-Next `config.json` that decides shapes and arithmetic."""

    qk_norm: bool = True
    output_gate: bool = True
    zero_centred_norms: bool = True

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3NextConfig:
        """Read a parsed `config.json`.

        Raises:
            ValueError: for another family, or arithmetic that is not implemented.
        """
        text = text_config(config, "Qwen3-Next", MODEL_TYPES)
        require(text, "Qwen3-Next", hidden_act="silu", attention_bias=False)
        if text.get("num_experts"):
            require_parts(text, "Qwen3-Next", "shared_expert_intermediate_size")
        names = (
            *("num_key_value_heads", "head_dim", "intermediate_size", *LINEAR_ATTENTION_FIELDS),
            *(*MOE_FIELDS, "shared_expert_intermediate_size", "norm_topk_prob"),
        )
        fields = decoder_fields(config, text, names, partial_rotary_factor=0.25)
        return cls(**fields, dense_layers=dense_layers(text))


def mappings(config: DecoderConfig, naming: Naming) -> Iterator[TensorMapping]:
    """The mappings of every tensor of the model."""
    return blocks.decoder(config, naming, in_proj=blocks.grouped_in_proj)
