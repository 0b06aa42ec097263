"""Models that the GPU tests build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_fp32.config import Fp32Config
from megatron_fp32.models.provider import build_model, read_hf_config, transformer_config


def build(hf: Path, fp32: Fp32Config | None = None, *, bf16: bool = True, **overrides: Any) -> GPTModel:
    """The model of a checkpoint on the current GPU."""
    model = read_hf_config(hf)
    config = transformer_config(
        model,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        **{"transformer_impl": "transformer_engine", **overrides},
    )
    return build_model(model, config, fp32).cuda()
