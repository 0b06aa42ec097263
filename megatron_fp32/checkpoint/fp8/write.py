"""The files that say how a checkpoint is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fp32.checkpoint.quantization_claims import remove_claims, write_config
from megatron_fp32.weights.fp8.config import extra_files, quantization_config
from megatron_fp32.weights.fp8.scheme import Fp8Scheme
from megatron_fp32.weights.tensors import TensorInfo


def write_configs(directory: Path, config: dict[str, Any], infos: Mapping[str, TensorInfo], scheme: Fp8Scheme) -> None:
    """`config.json` and whatever else says how a checkpoint is quantized, in place of what the source said of it.

    Args:
        directory: to write into.
        config: the model's `config.json`, parsed.
        infos: all tensors of the float8 checkpoint.
        scheme: its format.
    """
    remove_claims(directory, config)
    quantized = {**config, "quantization_config": quantization_config(infos, scheme)}
    for file, content in {"config.json": quantized, **extra_files(infos, scheme)}.items():
        write_config(directory, content, file)
