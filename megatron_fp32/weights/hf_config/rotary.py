"""Rotary embeddings: reads their parameters from a `config.json` as transformers does, and computes the frequencies.

Source: transformers `modeling_rope_utils.py` (`convert_rope_params_to_dict`, `standardize_rope_params`,
`_compute_llama3_parameters`) and `compute_default_rope_parameters` of each family.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

_TYPES_WITH_LENGTH = ("llama3", "yarn", "longrope")
"""Rotary types for which transformers fills in `original_max_position_embeddings`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Rotary frequencies of Llama 3.1 and later: low frequencies are divided by `factor`, high ones stay, with a smooth
    transition in between.

    Source: transformers `modeling_rope_utils.py`, `_compute_llama3_parameters`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


SCALING_FIELDS = tuple(field.name for field in dataclasses.fields(Llama3RopeScaling))


def rope_parameters(text: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters of a text model's `config.json`, from the places where transformers looks for them.

    A `rope_scaling` that is not empty replaces `rope_parameters`. A parameter that the chosen object lacks is read from
    the field of its name outside of the object. If the file does not have `rope_theta` or `partial_rotary_factor`, the
    result does not have it either, because each model type has its own default.

    Raises:
        ValueError: when a field is not an object, or has parameters for each type of layer.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(text.get(name), dict | None):
            raise ValueError(f"config.json: {name} must hold an object, got {str(text[name])[:100]!r}")
    chosen = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = dict(text.get(chosen) or {})
    nested = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if nested:
        raise ValueError(
            f"config.json: {chosen} holds parameters for each type of layer ({', '.join(nested)[:200]}); expected one "
            "set of parameters for all layers, because transformers builds nothing else for this model type"
        )
    if "rope_theta" in text:
        rope.setdefault("rope_theta", text["rope_theta"])
    if "partial_rotary_factor" in text:
        # null means 1, not the model type's default.
        beside = text["partial_rotary_factor"]
        rope.setdefault("partial_rotary_factor", 1.0 if beside is None else beside)
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] in _TYPES_WITH_LENGTH:
        length = "original_max_position_embeddings"
        if length in text:
            rope[length] = text[length]
        elif "max_position_embeddings" in text:
            rope.setdefault(length, text["max_position_embeddings"])
    return rope


def rotary_fields(text: dict[str, Any], *, theta: float, partial_rotary_factor: float | None) -> dict[str, Any]:
    """`rope_theta`, `partial_rotary_factor` and `rope_scaling` of a `DecoderConfig`.

    Args:
        text: the text model's part of `config.json`.
        theta: the model type's default.
        partial_rotary_factor: the model type's default; None if it always rotates whole heads.

    Raises:
        ValueError: naming every field that is absent, or that transformers refuses.
    """
    rope = rope_parameters(text)
    partial = rope.get("partial_rotary_factor", partial_rotary_factor or 1.0)
    if partial_rotary_factor is None:
        if partial not in (None, 1):
            raise ValueError(
                f"config.json: partial_rotary_factor={partial!r}, expected 1: models of this type rotate whole heads"
            )
        partial = 1.0
    scaling = None
    if rope["rope_type"] == "llama3":
        missing = [f"rope_parameters.{name}" for name in SCALING_FIELDS if rope.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        scaling = Llama3RopeScaling(**{name: rope[name] for name in SCALING_FIELDS})
    found = {"rope_theta": rope.get("rope_theta", theta), "partial_rotary_factor": partial}
    empty = [name for name, value in found.items() if value is None]
    if empty:
        raise ValueError(f"config.json: {' and '.join(empty)} must be a number, got null")
    return {**{name: float(value) for name, value in found.items()}, "rope_scaling": scaling}


def inverse_frequencies(
    head_dim: int, theta: float, partial_rotary_factor: float = 1.0, scaling: Llama3RopeScaling | None = None
) -> Tensor:
    """Angle per position of every pair of rotated values, in radians, [ceil(rotated / 2)] in float64.

    Args:
        head_dim: values of a head, of which `int(head_dim * partial_rotary_factor)` are rotated.
        theta: base of the powers.
        partial_rotary_factor: see `head_dim`.
        scaling: for Llama 3.1 and later.
    """
    rotated = int(head_dim * partial_rotary_factor)
    frequencies = 1.0 / theta ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    low = torch.where(turns < scaling.low_freq_factor, frequencies / scaling.factor, between)
    return torch.where(turns > scaling.high_freq_factor, frequencies, low)
