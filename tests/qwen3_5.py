"""Small Qwen3.5 models: `TINY_QWEN3_5` of `megatron_fp32.testing`, with other sizes where a test needs them.

Checkpoints of the other families are in tests/families.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_fp32.testing.qwen3_5 import TINY_QWEN3_5, write_qwen3_5
from megatron_fp32.weights.families.qwen3_5 import Qwen35Config

TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
"""One of each kind."""

SMALL: dict[str, Any] = {
    "vocab_size": 57,
    "hidden_size": 27,
    "intermediate_size": 21,
    **TWO_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 9,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 22,
}
"""Sizes that no power of two divides, and heads that three ranks can share."""

EVEN: dict[str, Any] = {
    **SMALL,
    "intermediate_size": 22,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""Heads that two ranks can share; the vocabulary is still odd."""

BLOCKS: dict[str, Any] = {
    **TINY_QWEN3_5,
    "vocab_size": 200,
    "hidden_size": 256,
    "intermediate_size": 384,
    **TWO_LAYERS,
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
"""Sizes that fill blocks of 128, as transformers' dequantization needs them."""

MOE: dict[str, Any] = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
"""A mixture of experts whose sizes fill blocks of 128; with `BLOCKS`."""

MOE_FAMILIES = ("qwen3_next", "qwen3_5_moe")


def tiny_qwen3_5(**fields: Any) -> Qwen35Config:
    """Shapes of a Qwen3.5 of two layers, one of each kind, with grouped value heads, for models without checkpoints."""
    shapes = {
        **TINY_QWEN3_5,
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "layer_types": ("linear_attention", "full_attention"),
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    }
    del shapes["num_hidden_layers"]  # Qwen35Config counts the layers
    return Qwen35Config(**{**shapes, **fields})


def write_small(directory: Path, *, all_bf16: bool = False, **fields: Any) -> Path:
    """A checkpoint of `SMALL`; with `all_bf16` its F32 tensors are BF16, as in Qwen3.6."""
    write_qwen3_5(directory, **{**SMALL, **fields})
    if all_bf16:
        path = directory / "model.safetensors"
        save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    return directory


def write_dense(directory: Path) -> Path:
    """A checkpoint of `BLOCKS`."""
    return write_qwen3_5(directory, **BLOCKS)


def moe_class(family: str) -> tuple[Any, Any]:
    """Config and model."""
    from transformers.models import qwen3_5_moe, qwen3_next

    if family == "qwen3_next":
        return qwen3_next.Qwen3NextConfig, qwen3_next.Qwen3NextForCausalLM
    return qwen3_5_moe.Qwen3_5MoeTextConfig, qwen3_5_moe.Qwen3_5MoeForCausalLM


def write_moe(directory: Path, family: str, *, fused: bool) -> Path:
    """A checkpoint of `BLOCKS` and `MOE`; `fused` has one tensor for all experts of a layer, as released."""
    config, model_class = moe_class(family)
    torch.manual_seed(0)
    model = model_class(config(**BLOCKS, **MOE)).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    if fused:
        path = directory / "model.safetensors"
        tensors = {name: t for name, t in load_file(path).items() if not re.search(r"experts\.\d+\.", name)}
        stacked = {name: t.detach().contiguous() for name, t in model.state_dict().items() if ".experts." in name}
        save_file({**tensors, **stacked}, path, metadata={"format": "pt"})
    return directory
