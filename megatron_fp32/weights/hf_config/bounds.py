"""Limits on the sizes in a `config.json`, checked before memory is used for every layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from megatron_fp32.weights.experts import GATE_UP

if TYPE_CHECKING:
    from megatron_fp32.weights.hf_config.decoder import DecoderConfig

MAX_LAYERS = 4096
"""Layers of a model. No real model comes near this."""

MAX_EXPERTS = 2**17
"""Experts of all layers together. Qwen3-Next-80B has 24576, Kimi-K2 23040."""

MAX_WEIGHTS = 2**40
"""Weights of the embedding."""

_SPARE_LAYERS, _SPARE_EXPERTS = 64, 1024
"""Layers and experts that may be missing here. Up to these numbers, a later error names each missing tensor."""


def check_bounds(text: dict[str, Any]) -> None:
    """Refuse sizes that are each possible, but not together.

    Args:
        text: the text model's part of `config.json`; its fields have been checked to be numbers.

    Raises:
        ValueError: naming the fields.
    """
    for name in ("layer_types", "mlp_only_layers"):
        count = len(text.get(name) or ())
        if count > MAX_LAYERS:
            raise ValueError(f"config.json: {name} has {count} entries, expected at most {MAX_LAYERS}")
    layers = text.get("num_hidden_layers") or 0
    for name in ("num_experts", "num_local_experts"):
        count = text.get(name) or 0
        if layers * count > MAX_EXPERTS:
            raise ValueError(
                f"config.json: {layers} layers (num_hidden_layers) of {count} experts ({name}) are {layers * count} "
                f"experts, expected at most {MAX_EXPERTS}"
            )
    rows, columns = text.get("vocab_size") or 0, text.get("hidden_size") or 0
    if rows * columns > MAX_WEIGHTS:
        raise ValueError(
            f"config.json: an embedding of vocab_size={rows} times hidden_size={columns} has {rows * columns} weights, "
            f"expected at most {MAX_WEIGHTS}"
        )


def check_presence(config: DecoderConfig, names: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration with far more layers or experts than a checkpoint has tensors for.

    Args:
        config: what `config.json` says.
        names: names of the tensors of the Hugging Face checkpoint.
        shapes: shapes by name, as far as they are known.

    Raises:
        ValueError: naming the fields.
    """
    if config.num_layers > len(names) + _SPARE_LAYERS:
        raise ValueError(
            f"config.json: num_hidden_layers={config.num_layers}, but the checkpoint has {len(names)} tensors in all"
        )
    held = 0
    for name in names:
        if ".experts." in name:
            # Fused experts are the first axis of a tensor.
            held += (shapes.get(name, (MAX_EXPERTS,)) or (0,))[0] if name.endswith(f"experts.{GATE_UP}") else 1
    described = config.num_experts * sum(config.moe_layer_pattern)
    if described > held + _SPARE_EXPERTS:
        raise ValueError(
            f"config.json: {described} experts in all layers (num_experts={config.num_experts}), but the checkpoint "
            f"has tensors for at most {held}"
        )
