"""The mappings of all tensors of a model, from `config.json` and the names and shapes of the tensors.

The mappings of a model are independent: no tensor, or element of a stack, is in two mappings. No tensor is read here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from megatron_fp32.errors import CheckpointError, listing
from megatron_fp32.weights.families.registry import Family, find_family
from megatron_fp32.weights.hf_config.bounds import check_presence
from megatron_fp32.weights.hf_config.decoder import DecoderConfig
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.naming import MTP, Naming
from megatron_fp32.weights.spec import TensorSpec
from megatron_fp32.weights.stacking import extra_states, has_stacked_layers, stack_layers
from megatron_fp32.weights.tensors import FLOAT4, TensorInfo
from megatron_fp32.weights.vocabulary import PADDED_VOCABULARY


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelMap:
    """Every tensor of a model, with its names and shapes in Hugging Face and in Megatron."""

    family: Family
    config: DecoderConfig
    naming: Naming
    """The naming of the Hugging Face checkpoint."""
    mappings: tuple[TensorMapping, ...]

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every Hugging Face tensor, by name."""
        return {spec.name: spec.stored_shape for mapping in self.mappings for spec in mapping.hf}

    @property
    def megatron_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every Megatron tensor, by name."""
        return {spec.name: spec.stored_shape for mapping in self.mappings for spec in mapping.megatron}

    @property
    def extra_states(self) -> list[str]:
        """Keys of the empty objects that modules of Transformer Engine look for in a checkpoint."""
        return extra_states(self.mappings)

    def subset(self, holds: Callable[[TensorSpec], bool]) -> tuple[TensorMapping, ...]:
        """The mappings of some of the model, such as a pipeline stage or the experts of an expert-parallel rank.

        Args:
            holds: whether a Megatron tensor, an element of a stack, or rows of it are wanted.

        Raises:
            ValueError: when some of a mapping's Megatron tensors are wanted and others are not.
        """
        found = []
        for mapping in self.mappings:
            held = [holds(spec) for spec in mapping.megatron]
            if any(held) and not all(held):
                lacking = [str(spec) for spec, is_held in zip(mapping.megatron, held, strict=True) if not is_held]
                raise ValueError(f"{listing(lacking)} missing, expected next to the other tensors of {mapping.hf[0]}")
            if all(held):
                found.append(mapping)
        return tuple(found)


def map_model(
    hf_config: dict[str, Any], hf: Collection[str] | Mapping[str, TensorInfo], *, stacked: bool | None = None
) -> ModelMap:
    """The mappings of a model.

    Args:
        hf_config: parsed `config.json`.
        hf: names of the Hugging Face tensors to convert. Pass a mapping to their dtypes and shapes if you can: shapes
            tell whether fused experts are transposed.
        stacked: whether the Megatron checkpoint stacks its layers; None for megatron-core's default.

    Raises:
        CheckpointError: for a configuration that is not supported.
        ValueError: for tensors that are not supported.
    """
    shapes = {name: info.shape for name, info in hf.items()} if isinstance(hf, Mapping) else {}
    try:
        family = find_family(hf_config)
        config = family.parse(hf_config)
        check_presence(config, hf, shapes)
    except ValueError as error:
        # The message may quote a value of any length.
        raise CheckpointError(str(error)[:2000]) from error
    naming = Naming.from_tensors(hf, shapes)
    mappings: Iterable[TensorMapping] = family.mappings(config, naming)
    if config.is_homogeneous if stacked is None else stacked:
        mappings = stack_layers(mappings, config.num_layers)
    return ModelMap(family=family, config=config, naming=naming, mappings=tuple(mappings))


def map_trained_model(
    hf_config: dict[str, Any], hf: Mapping[str, TensorInfo], megatron: Mapping[str, TensorInfo]
) -> ModelMap:
    """The mappings of a Megatron model that was imported from a Hugging Face checkpoint and may have been trained.

    Args:
        hf_config: parsed `config.json` of the checkpoint that was imported; with a larger `vocab_size` if tokens were
            added.
        hf: the Hugging Face tensors that the import converted.
        megatron: every tensor of the Megatron model.

    Raises:
        CheckpointError: naming every tensor that does not match the configuration.
    """
    found = map_model(hf_config, hf, stacked=has_stacked_layers(megatron))
    problems = mismatches(found.megatron_shapes, {name: info.shape for name, info in megatron.items()})
    odd = [f"{n} is {i.dtype}" for n, i in megatron.items() if not i.dtype.is_floating_point or i.dtype == FLOAT4]
    problems += [f"expected floating-point weights, {listing(odd)}"] if odd else []
    missing = found.megatron_shapes.keys() - megatron.keys()
    if missing and all(name.startswith(MTP) for name in missing):
        problems.append(
            "the model was trained without its MTP layer: import the Hugging Face checkpoint once more, with "
            "mtp='carry' or mtp='drop', and pass the result as source=DIR"
        )
    unknown = found.hf_shapes.keys() ^ hf.keys()
    if unknown:
        problems.append(f"its tensors differ from the imported tensors: {listing(sorted(unknown))}")
    if problems:
        raise CheckpointError("this is not the model that was imported: " + "; ".join(problems))
    return found


def mismatches(wanted: Mapping[str, tuple[int, ...]], present: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One message each for missing, unexpected and misshapen tensors. Megatron's vocabulary may be padded."""
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
