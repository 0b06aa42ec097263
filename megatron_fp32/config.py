"""What is kept in fp32, as one validated value."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

GradPrecision = Literal["bf16", "bf16x2", "bf16x3"]
"""How the gradient of the logits enters the backward matrix products."""

DEFAULT_KEPT_PARAMETERS = ("A_log", "out_norm.weight")


def check_grad_precision(value: object) -> None:
    """Raise ValueError unless `value` is a `GradPrecision`."""
    if value not in get_args(GradPrecision):
        raise ValueError(f"grad_precision must be one of {get_args(GradPrecision)}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp32Config:
    """What `megatron_fp32` keeps in fp32.

    Raises:
        ValueError: on construction, for a value outside of what a field allows.
    """

    logits: bool = True
    """Compute the output layer's logits in fp32. `False` leaves megatron-core's layer untouched."""

    grad_precision: GradPrecision = "bf16"
    """How many bits of dY, the gradient of the logits, the backward products see.

    `"bf16"` rounds dY once to the dtype of the weight, as Megatron does. `"bf16x2"` and `"bf16x3"` split it into two
    and three 16-bit tensors, which keep 16 and 24 bits, at two and three times the cost of the backward products.
    """

    invariant: bool = False
    """Compute every logit in an order of summation that no batch, padding or tensor-parallel size changes.

    Given bit-equal hidden states, a token's logits are then bit-equal. Needs a weight and hidden states of 16 bits, and
    on CUDA a device of compute capability 9.0 or newer. Gradients are not included.
    """

    gated_delta_net: tuple[str, ...] = DEFAULT_KEPT_PARAMETERS
    """Parameters of every gated-delta-net layer that stay fp32, named relative to the layer. Empty keeps none."""

    def __post_init__(self) -> None:
        check_grad_precision(self.grad_precision)
        if isinstance(self.gated_delta_net, list):
            object.__setattr__(self, "gated_delta_net", tuple(self.gated_delta_net))
        if isinstance(self.gated_delta_net, str) or not all(
            isinstance(name, str) and name for name in self.gated_delta_net
        ):
            raise ValueError(
                f"gated_delta_net must be a tuple of non-empty parameter names, got {self.gated_delta_net!r}"
            )
