"""Names of experts in Hugging Face checkpoints: fused (all experts of a layer in two tensors), or each by itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import TensorInfo

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""Fused experts of a layer: `experts.gate_up_proj` [E, 2F, H] (gate before up) and `experts.down_proj` [E, H, F]."""

FUSED = re.compile(rf"(?P<experts>(?:.*\.)?experts\.)(?P<kind>{GATE_UP}|{DOWN})$")


def expert_prefix(mlp: str, expert: int) -> str:
    """The start of the names of one expert's tensors; `mlp` is the start of the names of its layer's MLP."""
    return f"{mlp}experts.{expert}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertPart:
    """The weight of one expert in a fused tensor: `tensor[expert, start:stop]`."""

    name: str
    expert: int
    start: int
    stop: int
    shape: tuple[int, int]


def expert_parts(name: str, shape: tuple[int, ...]) -> tuple[ExpertPart, ...]:
    """The experts in a fused tensor of Qwen3.5-MoE, under the names of separate experts, which engines read.

    `experts.gate_up_proj` [E, 2 I, H] holds gate and then up; `experts.down_proj` is [E, H, I]
    (transformers/models/qwen3_5_moe). They become `experts.{i}.gate_proj.weight`, `up_proj` and `down_proj`, as in
    Qwen3-Next and Qwen's FP8 releases.

    Args:
        name: the name of any tensor.
        shape: its shape.

    Returns:
        The weights, expert by expert; () if the tensor is not fused experts.
    """
    match = FUSED.match(name)
    if match is None or len(shape) != 3:
        return ()
    count, rows, columns = shape
    if match["kind"] == "down_proj":
        pieces = [("down_proj", 0, rows)]
    else:
        pieces = [("gate_proj", 0, rows // 2), ("up_proj", rows // 2, rows)]
    return tuple(
        ExpertPart(
            name=f"{match['experts']}{expert}.{kind}.weight",
            expert=expert,
            start=start,
            stop=stop,
            shape=(stop - start, columns),
        )
        for expert in range(count)
        for kind, start, stop in pieces
    )


def check_fused_experts(infos: Mapping[str, TensorInfo]) -> None:
    """Refuse fused experts that are not [E, 2F, H] and [E, H, F], such as transposed experts.

    Raises:
        CheckpointError: with the shapes of both tensors.
    """
    for name, info in infos.items():
        match = FUSED.match(name)
        if match is None or match["kind"] == "down_proj":
            continue
        other = infos.get(f"{match['experts']}down_proj")
        shapes = (info.shape, other.shape if other is not None else None)
        count, hidden, width = other.shape if other is not None and len(other.shape) == 3 else (0, 0, 0)
        if info.shape != (count, 2 * width, hidden):
            raise CheckpointError(
                f"{name} and its down_proj have the shapes {shapes[0]} and {shapes[1]}; expected [E, 2 I, H] and "
                "[E, H, I]"
            )
