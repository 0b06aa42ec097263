"""What a Hugging Face directory says of the quantization of its weights, found and taken out.

Such an entry survives when somebody dequantizes a checkpoint and keeps its config. An engine believes it, and looks for
scales that are not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLAIM_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of `config.json`, at any depth: transformers and every engine; compressed-tensors before 0.8; MLX."""

RECIPE = "recipe.yaml"

CLAIM_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quant_model_description.json",
    RECIPE,
)
"""Files beside `config.json`: of ModelOpt, GPTQ, AWQ, AutoRound, msModelSlim and llm-compressor."""


def find_claims(directory: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """The places that say how the weights are quantized, such as `config.json: text_config.quantization_config`.

    Args:
        directory: with the config and the files beside it.
        config: its `config.json`, parsed. It is not changed.
    """
    places = [f"config.json: {'.'.join((*path, key))}" for _, path, key in _entries(config)]
    return (*sorted(places), *(name for name in CLAIM_FILES if (directory / name).is_file()))


def drop_claims(config: dict[str, Any]) -> bool:
    """Take the entries out of a parsed `config.json`.

    Returns:
        Whether there were any.
    """
    found = _entries(config)
    for inner, _, key in found:
        del inner[key]
    return bool(found)


def remove_claims(directory: Path, config: dict[str, Any]) -> None:
    """Take the entries out of a directory that is being written. Without any, `config.json` keeps its bytes.

    Args:
        directory: with copies of the source's files.
        config: its `config.json`, parsed; the entries are taken out of it, too.
    """
    for name in CLAIM_FILES:
        (directory / name).unlink(missing_ok=True)
    if drop_claims(config):
        write_config(directory, config)


def write_config(directory: Path, config: dict[str, Any], name: str = "config.json") -> None:
    """Write a parsed JSON file as transformers does."""
    (directory / name).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _entries(config: dict[str, Any]) -> list[tuple[dict[str, Any], tuple[str, ...], str]]:
    """Objects, their paths, and the keys of entries in them; without recursion, however deeply a config is nested.

    An entry of null says nothing, and transformers loads such a config.
    """
    found = []
    pending: list[tuple[Any, tuple[str, ...]]] = [(config, ())]
    while pending:
        inner, path = pending.pop()
        if isinstance(inner, list):
            pending += [(value, (*path, str(index))) for index, value in enumerate(inner)]
        elif isinstance(inner, dict):
            found += [(inner, path, key) for key in CLAIM_KEYS if inner.get(key) is not None]
            pending += [(value, (*path, key)) for key, value in inner.items() if key not in CLAIM_KEYS]
    return found
