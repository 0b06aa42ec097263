"""Find and remove entries and files of a Hugging Face directory that say that its weights are quantized.

Such an entry is left over when a checkpoint is dequantized and its config is kept. An engine then looks for scales that
do not exist.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of `config.json`, at any depth: of transformers and all engines; of compressed-tensors before 0.8; of MLX."""

RECIPE = "recipe.yaml"

QUANTIZATION_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quant_model_description.json",
    RECIPE,
)
"""Files next to `config.json`: of ModelOpt, GPTQ, AWQ, AutoRound, msModelSlim and llm-compressor."""


def find_quantization_entries(directory: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """Find such entries and files, listed like `config.json: text_config.quantization_config`.

    Args:
        directory: the Hugging Face directory.
        config: its parsed `config.json`, which is not changed.
    """
    places = [f"config.json: {'.'.join((*path, key))}" for _, path, key in _entries(config)]
    return (*sorted(places), *(name for name in QUANTIZATION_FILES if (directory / name).is_file()))


def drop_quantization_entries(config: dict[str, Any]) -> bool:
    """Remove the entries from a parsed `config.json`.

    Returns:
        Whether there were any.
    """
    found = _entries(config)
    for inner, _, key in found:
        del inner[key]
    return bool(found)


def remove_quantization_entries(directory: Path, config: dict[str, Any]) -> None:
    """Remove the entries and files from an output directory. `config.json` is only written if it has entries.

    Args:
        directory: the output directory, with copies of the source's files.
        config: its parsed `config.json`, from which the entries are removed, too.
    """
    for name in QUANTIZATION_FILES:
        (directory / name).unlink(missing_ok=True)
    if drop_quantization_entries(config):
        write_config(directory, config)


def write_config(directory: Path, config: dict[str, Any], name: str = "config.json") -> None:
    """Write a JSON file in transformers' style."""
    (directory / name).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _entries(config: dict[str, Any]) -> list[tuple[dict[str, Any], tuple[str, ...], str]]:
    """(object, path of the object, key in it) of every entry. There is no recursion, because a config may be deep.

    An entry of null is ignored, because transformers loads a config with it.
    """
    found = []
    pending: list[tuple[Any, tuple[str, ...]]] = [(config, ())]
    while pending:
        inner, path = pending.pop()
        if isinstance(inner, list):
            pending += [(value, (*path, str(index))) for index, value in enumerate(inner)]
        elif isinstance(inner, dict):
            found += [(inner, path, key) for key in QUANTIZATION_KEYS if inner.get(key) is not None]
            pending += [(value, (*path, key)) for key, value in inner.items() if key not in QUANTIZATION_KEYS]
    return found
