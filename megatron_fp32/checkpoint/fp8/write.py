"""Writes the config files of an FP8 checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fp32.checkpoint.quantization_entries import remove_quantization_entries, write_config
from megatron_fp32.weights.fp8.config import extra_files, quantization_config
from megatron_fp32.weights.fp8.scheme import Fp8Scheme
from megatron_fp32.weights.tensors import TensorInfo


def write_configs(directory: Path, config: dict[str, Any], infos: Mapping[str, TensorInfo], scheme: Fp8Scheme) -> None:
    """Write `config.json` and the other files that describe the quantization, and remove the source's entries.

    Args:
        directory: the directory to write into.
        config: the model's parsed `config.json`.
        infos: all tensors of the FP8 checkpoint.
        scheme: the format of the FP8 checkpoint.
    """
    remove_quantization_entries(directory, config)
    quantized = {**config, "quantization_config": quantization_config(infos, scheme)}
    for file, content in {"config.json": quantized, **extra_files(infos, scheme)}.items():
        write_config(directory, content, file)
