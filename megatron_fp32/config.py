"""What is kept in fp32, as one validated value."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

GradPrecision = Literal["bf16"]
"""How the gradient of the logits enters the backward matrix products."""

DEFAULT_KEPT_PARAMETERS = ("A_log", "out_norm.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp32Config:
    """What `megatron_fp32` keeps in fp32.

    Raises:
        ValueError: on construction, for a value outside of what a field allows.
    """

    logits: bool = True
    """Compute the output layer's logits in fp32. `False` leaves megatron-core's layer untouched."""

    grad_precision: GradPrecision = "bf16"
    """`"bf16"` rounds dY once to the dtype of the weight before the backward products, as Megatron does."""

    gated_delta_net: tuple[str, ...] = DEFAULT_KEPT_PARAMETERS
    """Parameters of every gated-delta-net layer that stay fp32, named relative to the layer. Empty keeps none."""

    def __post_init__(self) -> None:
        if self.grad_precision not in get_args(GradPrecision):
            raise ValueError(f"grad_precision must be one of {get_args(GradPrecision)}, got {self.grad_precision!r}")
        if isinstance(self.gated_delta_net, str) or not all(
            isinstance(name, str) and name for name in self.gated_delta_net
        ):
            raise ValueError(
                f"gated_delta_net must be a tuple of non-empty parameter names, got {self.gated_delta_net!r}"
            )
