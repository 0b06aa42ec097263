"""Small models whose sizes fill blocks of 128, as transformers' dequantization needs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fp32.testing.qwen3_5 import write_qwen3_5

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}

MOE: dict[str, Any] = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}

MOE_FAMILIES = ("qwen3_next", "qwen3_5_moe")


def write_dense(directory: Path) -> Path:
    return write_qwen3_5(directory, **SIZES)


def moe_class(family: str) -> tuple[Any, Any]:
    """Config and model."""
    from transformers.models import qwen3_5_moe, qwen3_next

    if family == "qwen3_next":
        return qwen3_next.Qwen3NextConfig, qwen3_next.Qwen3NextForCausalLM
    return qwen3_5_moe.Qwen3_5MoeTextConfig, qwen3_5_moe.Qwen3_5MoeForCausalLM


def write_moe(directory: Path, family: str, *, fused: bool) -> Path:
    """A mixture of experts; `fused` as in the released Qwen3.5-MoE, with one tensor for all experts of a layer."""
    config, model_class = moe_class(family)
    torch.manual_seed(0)
    model = model_class(config(**SIZES, **MOE)).bfloat16()
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


def written(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]
