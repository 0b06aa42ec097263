"""The plan of an import, decided from headers. No tensor is read."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from megatron_fp32.errors import CheckpointError, listing
from megatron_fp32.weights.choices import Mtp, Vision
from megatron_fp32.weights.hf_config.decoder import DecoderConfig
from megatron_fp32.weights.model_map import ModelMap, map_model, mismatches
from megatron_fp32.weights.naming import MTP, VISION, is_rotary_frequencies
from megatron_fp32.weights.tensors import DTYPE_NAMES, TensorInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPlan(ModelMap):
    """The mappings of an import, and the tensors that are not converted."""

    carried: tuple[str, ...]
    """Hugging Face tensors that are kept in the sidecar without conversion."""
    left_out: tuple[str, ...]
    """Hugging Face tensors that are neither converted nor kept."""
    frequencies: tuple[str, ...]
    """The carried tensors that hold rotary frequencies, which can be computed from `config.json`."""


def plan_import(
    hf_config: dict[str, Any], hf: Mapping[str, TensorInfo], *, vision: Vision = "refuse", mtp: Mtp = "convert"
) -> ImportPlan:
    """Plan the import of a Hugging Face checkpoint.

    Args:
        hf_config: parsed `config.json`.
        hf: every tensor of the checkpoint.
        vision, mtp: see `import_checkpoint`.

    Raises:
        CheckpointError: naming every tensor that does not match the configuration.
        ValueError: for a model that is not supported.
    """
    parts: tuple[tuple[str | tuple[str, ...], str], ...] = ((VISION, vision), (MTP, mtp))
    refused, carried, dropped = (
        tuple(name for name in hf if any(name.startswith(start) for start, chosen in parts if chosen == what))
        for what in ("refuse", "carry", "drop")
    )
    named = {*carried, *dropped, *refused}
    frequencies = tuple(name for name in hf if is_rotary_frequencies(name) and name not in named)
    carried = (*carried, *frequencies)
    if refused:
        raise CheckpointError(
            f"{len(refused)} tensors of its vision part cannot be converted: {listing(refused)}. Pass vision='carry' "
            "to keep them in hf_source/ for an export, or pass vision='drop' or text_only=True to leave them out"
        )
    converted = {name: info for name, info in hf.items() if name not in {*carried, *dropped}}
    _refuse_quantized(converted)
    found = map_model(hf_config, converted)
    problems = [*mismatches(found.hf_shapes, {n: i.shape for n, i in converted.items()}), *_dtype_problems(found, hf)]
    if problems:
        raise CheckpointError("the tensors do not match config.json: " + "; ".join(problems))
    known = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return ImportPlan(**known, carried=carried, left_out=dropped, frequencies=frequencies)


def _refuse_quantized(tensors: Mapping[str, TensorInfo]) -> None:
    weights = [name for name in tensors if f"{name}_scale_inv" in tensors or f"{name}_scale" in tensors]
    if weights:
        dtypes = ", ".join(sorted({DTYPE_NAMES[tensors[name].dtype] for name in weights}))
        raise CheckpointError(
            f"{len(weights)} weights are quantized to {dtypes} and have scales: {listing(weights)}. An import reads "
            "weights of 16 bits or more: import the checkpoint that was quantized, such as the bf16 release"
        )


def _dtype_problems(model: ModelMap, hf: Mapping[str, TensorInfo]) -> list[str]:
    """Messages for Megatron tensors whose Hugging Face tensors have several dtypes, or a dtype below 16 bits."""
    sources: dict[str, dict[str, torch.dtype]] = {}
    for mapping in model.mappings:
        dtypes = {spec.name: hf[spec.name].dtype for spec in mapping.hf if spec.name in hf}
        for spec in mapping.megatron:
            sources.setdefault(spec.name, {}).update(dtypes)
    problems: dict[str, None] = {}
    for dtypes in sources.values():
        kinds = set(dtypes.values())
        if len(kinds) > 1:
            listed = listing(sorted(map(str, kinds)))
            problems[f"one Megatron tensor cannot hold the dtypes {listed} of {listing(list(dtypes))}"] = None
        for dtype in kinds:
            if not dtype.is_floating_point or dtype.itemsize < 2:
                expected = "expected a floating-point dtype of 16 bits or more"
                problems[f"{listing(list(dtypes))} are {dtype}; {expected}"] = None
    return list(problems)


def megatron_args(config: DecoderConfig) -> Namespace:
    """The arguments that Megatron compares with its command line (megatron/training/checkpointing.py)."""
    return Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size or config.moe_intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        num_experts=config.num_experts or None,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
    )
