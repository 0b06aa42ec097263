"""What a conversion will do, decided from headers alone: pure functions, no tensor is read.

The steps of a plan are independent of each other: each reads the tensors of one mapping and writes those of the other
side, whole tensors or elements of stacks that nobody else writes.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch

from megatron_fp32.checkpoint.formats.huggingface import TensorInfo
from megatron_fp32.errors import CheckpointError, listing
from megatron_fp32.weights.families.registry import Family, find_family
from megatron_fp32.weights.hf_config.bounds import check_presence
from megatron_fp32.weights.hf_config.decoder import DecoderConfig
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.naming import MTP, VISION, Naming, is_rotary_frequencies
from megatron_fp32.weights.stacking import extra_states, has_stacked_layers, stack_layers
from megatron_fp32.weights.tensors import FLOAT4
from megatron_fp32.weights.vocabulary import PADDED_VOCABULARY

Vision = Literal["refuse", "carry", "drop"]
"""Tensors of the vision part: none may be there, or they are kept beside the checkpoint, or left out."""

Mtp = Literal["convert", "carry", "drop"]
"""Tensors of multi-token prediction: they become a Megatron MTP layer, or as above."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A model's tensors on both sides."""

    family: Family
    config: DecoderConfig
    naming: Naming
    """Of the Hugging Face checkpoint."""
    mappings: tuple[TensorMapping, ...]

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor."""
        return {spec.name: spec.stored_shape for mapping in self.mappings for spec in mapping.hf}

    @property
    def megatron_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Megatron tensor."""
        return {spec.name: spec.stored_shape for mapping in self.mappings for spec in mapping.megatron}

    @property
    def extra_states(self) -> list[str]:
        """Keys of the empty objects that modules of Transformer Engine look for in a checkpoint."""
        return extra_states(self.mappings)

    def megatron_args(self) -> Namespace:
        """What Megatron compares between a checkpoint and its command line (megatron/training/checkpointing.py)."""
        return Namespace(
            num_layers=self.config.num_layers,
            hidden_size=self.config.hidden_size,
            ffn_hidden_size=self.config.intermediate_size or self.config.moe_intermediate_size,
            num_attention_heads=self.config.num_attention_heads,
            num_query_groups=self.config.num_key_value_heads,
            kv_channels=self.config.head_dim,
            num_experts=self.config.num_experts or None,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPlan(Plan):
    """What an import reads and writes."""

    carried: tuple[str, ...]
    """Hugging Face tensors that are kept beside the checkpoint as they are."""
    left_out: tuple[str, ...]
    frequencies: tuple[str, ...]
    """Of those that are carried, stored rotary frequencies: they follow from `config.json`."""


def plan_model(
    hf_config: dict[str, Any], hf: Collection[str] | Mapping[str, TensorInfo], *, stacked: bool | None = None
) -> Plan:
    """The tensors of a model.

    Args:
        hf_config: parsed `config.json`.
        hf: names of the tensors that the Hugging Face checkpoint has, without those that are not converted; and what
            they are, which tells how fused experts are laid out.
        stacked: whether the Megatron checkpoint stacks its layers; None for what megatron-core does by default.

    Raises:
        CheckpointError: for a configuration that is not supported.
        ValueError: for tensors that are not.
    """
    shapes = {name: info.shape for name, info in hf.items()} if isinstance(hf, Mapping) else {}
    try:
        family = find_family(hf_config)
        config = family.parse(hf_config)
        check_presence(config, hf, shapes)
    except ValueError as error:
        # A value of any length may be in it.
        raise CheckpointError(str(error)[:2000]) from error
    naming = Naming.of(hf, shapes)
    mappings: Iterable[TensorMapping] = family.mappings(config, naming)
    if config.is_homogeneous if stacked is None else stacked:
        mappings = stack_layers(mappings, config.num_layers)
    return Plan(family=family, config=config, naming=naming, mappings=tuple(mappings))


def plan_import(
    hf_config: dict[str, Any], hf: Mapping[str, TensorInfo], *, vision: Vision = "refuse", mtp: Mtp = "convert"
) -> ImportPlan:
    """What an import of a Hugging Face checkpoint does.

    Args:
        hf_config: parsed `config.json`.
        hf: every tensor of the checkpoint.
        vision, mtp: what to do with these parts.

    Raises:
        CheckpointError: naming every tensor that does not fit the configuration.
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
            f"{len(refused)} tensors of its vision part cannot be converted: {listing(refused)}. --vision carry keeps "
            "them beside the checkpoint for the export, --vision drop or --text-only leaves them out"
        )
    converted = {name: info for name, info in hf.items() if name not in {*carried, *dropped}}
    plan = plan_model(hf_config, converted)
    problems = [*_mismatches(plan.hf_shapes, {n: i.shape for n, i in converted.items()}), *_dtype_problems(plan, hf)]
    if problems:
        raise CheckpointError("the tensors do not match config.json: " + "; ".join(problems))
    known = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return ImportPlan(**known, carried=carried, left_out=dropped, frequencies=frequencies)


def plan_export(hf_config: dict[str, Any], hf: Mapping[str, TensorInfo], megatron: Mapping[str, TensorInfo]) -> Plan:
    """What an export of a Megatron checkpoint does.

    Args:
        hf_config: parsed `config.json` of the checkpoint that was imported; its `vocab_size` may be larger now.
        hf: the tensors that were converted then.
        megatron: every tensor of the model in the Megatron checkpoint.

    Raises:
        CheckpointError: naming every tensor that is not as the configuration says.
    """
    plan = plan_model(hf_config, hf, stacked=has_stacked_layers(megatron))
    problems = _mismatches(plan.megatron_shapes, {name: info.shape for name, info in megatron.items()})
    odd = [f"{n} is {i.dtype}" for n, i in megatron.items() if not i.dtype.is_floating_point or i.dtype == FLOAT4]
    problems += [f"expected floating-point weights, {listing(odd)}"] if odd else []
    missing = plan.megatron_shapes.keys() - megatron.keys()
    if missing and all(name.startswith(MTP) for name in missing):
        problems.append(
            "it was trained without its multi-token prediction: import the Hugging Face checkpoint once more, with "
            "--mtp carry or --mtp drop, and name the result with --source"
        )
    unknown = plan.hf_shapes.keys() ^ hf.keys()
    if unknown:
        problems.append(f"not the same tensors as were imported: {listing(sorted(unknown))}")
    if problems:
        raise CheckpointError("this is not the model that was imported: " + "; ".join(problems))
    return plan


def _mismatches(wanted: Mapping[str, tuple[int, ...]], present: Mapping[str, tuple[int, ...]]) -> list[str]:
    found = {
        "missing": sorted(wanted.keys() - present.keys()),
        "unexpected": sorted(present.keys() - wanted.keys()),
        "misshapen": [
            f"{name} {present[name]} (expected {shape})"
            for name, shape in wanted.items()
            if name in present and not _shape_fits(name, present[name], shape)
        ],
    }
    return [f"{len(names)} {kind} tensors: {listing(names)}" for kind, names in found.items() if names]


def _shape_fits(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if name in PADDED_VOCABULARY:
        return len(shape) == 2 and shape[0] >= expected[0] and shape[1:] == expected[1:]
    return shape == expected


def _dtype_problems(plan: Plan, hf: Mapping[str, TensorInfo]) -> list[str]:
    """A Megatron tensor has one dtype, whatever it is put together from."""
    sources: dict[str, dict[str, torch.dtype]] = {}
    for mapping in plan.mappings:
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
