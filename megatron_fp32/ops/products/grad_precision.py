"""How many bits of dY the backward products see. Needs no torch."""

from __future__ import annotations

from typing import Literal, get_args

from megatron_fp32.validation import check_choice

GradPrecision = Literal["bf16", "bf16x2", "bf16x3"]
"""How the gradient of the logits enters the backward matrix products."""

PIECES: dict[GradPrecision, int] = {"bf16": 1, "bf16x2": 2, "bf16x3": 3}
"""How many 16-bit tensors stand for dY."""


def check_grad_precision(value: object) -> None:
    """Raise ValueError unless `value` is a `GradPrecision`."""
    check_choice("grad_precision", value, get_args(GradPrecision))
