"""The rules that the sizes of a decoder must follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_fp32.weights.hf_config.decoder import DecoderConfig

LINEAR_ATTENTION_FIELDS = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""Fields of a gated delta net. They have one name in `config.json`, `DecoderConfig` and `TransformerConfig`."""

MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
"""Fields of a mixture of experts. They have one name in `config.json` and `DecoderConfig`."""


def impossible_sizes(config: DecoderConfig) -> list[str]:
    """One message for each broken rule, with the names of the fields; [] if a model can have these sizes."""
    return [message for message, is_right in _rules(config) if not is_right]


def _rules(config: DecoderConfig) -> Iterator[tuple[str, bool]]:
    """(message, whether the rule is kept) of every rule."""
    yield from _positive(config, ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads"))
    yield from _positive(config, ("head_dim", "num_layers"))
    yield _divides(config, "num_attention_heads", "num_key_value_heads")
    rotated = int(config.head_dim * config.partial_rotary_factor)
    yield (
        f"partial_rotary_factor={config.partial_rotary_factor} of head_dim={config.head_dim} rotates {rotated} values",
        0 < rotated <= config.head_dim,
    )
    # An odd number of rotated values is rounded up, which works while it is less than the whole head.
    yield (
        f"head_dim={config.head_dim} is odd, and rotary embeddings turn pairs",
        rotated < config.head_dim or rotated % 2 == 0,
    )
    yield f"rope_theta={config.rope_theta} is not above 0", config.rope_theta > 0
    if config.rope_scaling is not None:
        low, high = config.rope_scaling.low_freq_factor, config.rope_scaling.high_freq_factor
        yield f"high_freq_factor={high} is not above low_freq_factor={low}", high > low
    if config.has_gated_delta_net or any(config.linear_attention_pattern):
        yield from _positive(config, LINEAR_ATTENTION_FIELDS)
        yield _divides(config, "linear_num_value_heads", "linear_num_key_heads")
    if any(config.moe_layer_pattern):
        yield from _positive(config, MOE_FIELDS)
        yield (
            f"num_experts_per_tok={config.num_experts_per_tok} is more than num_experts={config.num_experts}",
            config.num_experts_per_tok <= config.num_experts,
        )
    if not all(config.moe_layer_pattern):
        yield from _positive(config, ("intermediate_size",))


def _positive(config: DecoderConfig, names: Iterable[str]) -> Iterator[tuple[str, bool]]:
    for name in names:
        yield f"{name} must be at least 1, got {getattr(config, name)}", getattr(config, name) >= 1


def _divides(config: DecoderConfig, whole: str, part: str) -> tuple[str, bool]:
    """The rule that a field is a multiple of another."""
    values = getattr(config, whole), getattr(config, part)
    is_right = values[1] < 1 or values[0] % values[1] == 0
    return f"{whole}={values[0]} is not a multiple of {part}={values[1]}", is_right
