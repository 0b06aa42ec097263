"""The families of models that can be converted and built, found by the `model_type` of their `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from megatron_fp32.weights.families import llama, qwen3, qwen3_5, qwen3_5_moe, qwen3_moe, qwen3_next
from megatron_fp32.weights.hf_config.decoder import DecoderConfig
from megatron_fp32.weights.hf_config.text import text_part
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.naming import Naming


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: how to read its `config.json`, and where its tensors are."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` in `config.json`, of the text model and of the vision-language model around it."""
    parse: Callable[[dict[str, Any]], DecoderConfig]
    """Reads a parsed `config.json`. Raises ValueError for a model that is not supported."""
    mappings: Callable[[DecoderConfig, Naming], Iterator[TensorMapping]]
    """The mappings of every tensor of a model, with one set of Megatron keys for each layer."""


FAMILIES = (
    Family(
        name="Qwen3.5",
        model_types=qwen3_5.MODEL_TYPES,
        parse=qwen3_5.Qwen35Config.from_hf,
        mappings=qwen3_5.mappings,
    ),
    Family(
        name="Qwen3.5-MoE",
        model_types=qwen3_5_moe.MODEL_TYPES,
        parse=qwen3_5_moe.Qwen35MoeConfig.from_hf,
        mappings=qwen3_5_moe.mappings,
    ),
    Family(
        name="Qwen3-Next",
        model_types=qwen3_next.MODEL_TYPES,
        parse=qwen3_next.Qwen3NextConfig.from_hf,
        mappings=qwen3_next.mappings,
    ),
    Family(name="Qwen3", model_types=qwen3.MODEL_TYPES, parse=qwen3.Qwen3Config.from_hf, mappings=qwen3.mappings),
    Family(
        name="Qwen3-MoE",
        model_types=qwen3_moe.MODEL_TYPES,
        parse=qwen3_moe.Qwen3MoeConfig.from_hf,
        mappings=qwen3_moe.mappings,
    ),
    Family(name="Llama", model_types=llama.MODEL_TYPES, parse=llama.LlamaConfig.from_hf, mappings=llama.mappings),
)


def find_family(hf_config: Any) -> Family:
    """The family of a parsed `config.json`.

    Raises:
        ValueError: when the model belongs to none of `FAMILIES`.
    """
    if not isinstance(hf_config, dict):
        raise ValueError(f"config.json must hold an object, got {type(hf_config).__name__}")
    found = (text_part(hf_config) or {}).get("model_type")
    for family in FAMILIES:
        if found in family.model_types:
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    of = f" (architectures: {_architectures(hf_config)})" if _architectures(hf_config) else ""
    what = "no model_type" if found is None else f"the model_type {found!r}"
    raise ValueError(
        f"config.json names {what}{of}, which is not supported. Supported are {known}. To add a "
        "family, write a file in megatron_fp32/weights/families/ and list it in registry.py there; "
        "docs/design/add-a-family.md says how"
    )


def _architectures(hf_config: dict[str, Any]) -> str:
    """The names in `architectures`, for a message."""
    listed = hf_config.get("architectures")
    return ", ".join(str(name)[:100] for name in listed[:4]) if isinstance(listed, list) else ""
