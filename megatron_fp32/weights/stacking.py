"""Stacks of layers and `_extra_state` objects in megatron-core's `torch_dist` checkpoints.

Sources: megatron-core `transformer/transformer_block.py` (`sharded_state_dict`: when layers are stacked),
`dist_checkpointing/mapping.py` (`ShardedObject.unique_key`), `extensions/transformer_engine.py` (which modules have an
`_extra_state`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.spec import TensorSpec

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

_TRANSFORMER_ENGINE_MODULES = {
    *("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm"),
    *("in_proj", "out_norm", "out_proj"),
    *("linear_fc1", "linear_fc2", "pre_mlp_layernorm", "final_layernorm"),
    *("enorm", "hnorm", "eh_proj"),
}
"""Modules whose Transformer Engine version stores an `_extra_state` object."""


def stack_layers(mappings: Iterable[TensorMapping], num_layers: int) -> Iterator[TensorMapping]:
    """The mappings for a checkpoint with stacked decoder layers: `decoder.layers.mlp.linear_fc2.weight` [L, H, F]."""

    def stacked(spec: TensorSpec) -> TensorSpec:
        found = _LAYER.fullmatch(spec.name)
        return spec.in_stack(int(found[1]), num_layers, f"decoder.layers.{found[2]}") if found else spec

    for mapping in mappings:
        yield mapping.place(megatron=stacked)


def has_stacked_layers(names: Collection[str]) -> bool:
    """Whether a checkpoint with these tensors stacks the decoder's layers."""
    return any(map(is_stack_of_layers, names))


def is_stack_of_layers(name: str) -> bool:
    """Whether the tensor of this name has the decoder's layers as its first axis."""
    return name.startswith("decoder.layers.") and not _LAYER.fullmatch(name)


def name_in_layer(stack: str, layer: int) -> str:
    """The name that an element of a stack of layers has in a checkpoint that does not stack layers."""
    return stack.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)


def extra_states(mappings: Iterable[TensorMapping]) -> list[str]:
    """Keys of the `_extra_state` objects of these mappings' modules."""
    keys: dict[str, None] = {}
    for mapping in mappings:
        for spec in mapping.megatron:
            module = re.split(r"\.(?:weight|layer_norm_weight)\b", spec.name)[0]
            if module != spec.name and module.rsplit(".", 1)[-1] in _TRANSFORMER_ENGINE_MODULES:
                index, stack = (".".join(map(str, at)) for at in (spec.index or (0,), spec.stack or (1,)))
                keys[f"{module}._extra_state/shard_{index}_{stack}"] = None
    return list(keys)
