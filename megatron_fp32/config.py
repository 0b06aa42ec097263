"""`Fp32Config`: what is kept in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from megatron_fp32.ops.products.grad_precision import GradPrecision, check_grad_precision
from megatron_fp32.validation import check_choice, check_count, check_flag

FusedLoss = Literal["off", "recompute", "saved"]
"""How a model computes its loss.

- `"off"`: from logits.
- `"recompute"`: without storing logits; the backward pass computes them again.
- `"saved"`: the logits of this rank are saved for the backward pass.
"""

Weights = Literal["initialized", "loaded"]
"""Where the values of a built model come from: megatron-core's initialization, or a checkpoint."""

DEFAULT_KEPT_PARAMETERS = ("A_log", "out_norm.weight")


def check_weights(value: object) -> None:
    """Raise ValueError unless `value` is one of `Weights`."""
    if value not in get_args(Weights):
        raise ValueError(
            "weights must be 'initialized' (A_log may be drawn again) or 'loaded' (A_log must keep its values), got "
            f"{value!r}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp32Config:
    """What `megatron_fp32` keeps in fp32.

    Raises:
        ValueError: on construction, for a value that a field does not allow.
        TypeError: on construction, for a flag that is not a bool, such as "false", or a size that is not an int.
    """

    logits: bool = True
    """Compute the output layer's logits in fp32. `False` leaves megatron-core's layer untouched."""

    grad_precision: GradPrecision = "bf16"
    """How many bits of dY, the gradient of the logits, the backward products use.

    - `"bf16"` rounds dY once to the dtype of the weight, as Megatron does.
    - `"bf16x2"` splits dY into two 16-bit tensors, which keep 16 bits. The backward products cost twice as much.
    - `"bf16x3"` splits dY into three 16-bit tensors, which keep 24 bits. The backward products cost three times as
      much.
    """

    invariant: bool = False
    """Compute every logit in one order of summation for every batch, padding and tensor-parallel size.

    For bit-equal hidden states, the logits of a token are then bit-equal. Needs a weight and hidden states of 16 bits,
    and on CUDA a device of compute capability 9.0 or newer. With `fused_loss`, the losses and the gradient of the
    hidden states are bit-equal, too; without `fused_loss`, gradients may differ in their last bits.
    """

    fused_loss: FusedLoss = "off"
    """Compute the loss from hidden states and weight, without `[tokens, vocab]` in memory.

    `"recompute"` multiplies again in the backward pass. `"saved"` saves this rank's fp32 logits for the backward pass.
    A model that is called without labels, or whose logits are gathered, computes logits. Needs `logits=True` and an
    output layer without a bias.
    """

    vocab_size: int | None = None
    """Size of the vocabulary without Megatron's padding rows, to which `fused_loss` then gives no probability. With
    None, padding rows count as tokens, as in Megatron's cross entropy."""

    gated_delta_net: tuple[str, ...] = DEFAULT_KEPT_PARAMETERS
    """Names, within the layer, of the parameters of every gated-delta-net layer that stay fp32. () keeps none."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fp32Config:
        """Read a section of a framework's own config, such as parsed YAML or an OmegaConf node.

        `fused_loss: off` without quotes is False in YAML 1.1, and means `"off"` here.

        Args:
            values: the value of each field, by the field's name. A missing field gets its default.

        Raises:
            ValueError: for a name that is not a field, or a value that the field does not allow.
            TypeError: for a value of another type, such as the text "true", or a section that is not a mapping.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"expected a mapping with the fields of Fp32Config, got {values!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(
                f"Fp32Config has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(known)}"
            )
        fields = dict(values)
        if fields.get("fused_loss") is False:
            fields["fused_loss"] = "off"
        names = fields.get("gated_delta_net")
        if isinstance(names, Sequence) and not isinstance(names, str | bytes):
            fields["gated_delta_net"] = tuple(names)
        return cls(**fields)

    def __post_init__(self) -> None:
        check_flag("logits", self.logits)
        check_grad_precision(self.grad_precision)
        check_flag("invariant", self.invariant)
        check_choice("fused_loss", self.fused_loss, get_args(FusedLoss))
        if self.fused_loss != "off" and not self.logits:
            raise ValueError("fused_loss needs logits=True, because the fp32 output layer computes it")
        if self.vocab_size is not None:
            check_count("vocab_size", self.vocab_size)
        if isinstance(self.gated_delta_net, list):
            object.__setattr__(self, "gated_delta_net", tuple(self.gated_delta_net))
        if not isinstance(self.gated_delta_net, tuple) or not all(
            isinstance(name, str) and name for name in self.gated_delta_net
        ):
            raise ValueError(
                f"gated_delta_net must be a tuple of non-empty parameter names, got {self.gated_delta_net!r}"
            )


def config_or_default(config: Fp32Config | None, *, name: str = "config") -> Fp32Config:
    """The configuration that a caller gave, or the default for None. Raises TypeError for anything else."""
    if config is None:
        return Fp32Config()
    if not isinstance(config, Fp32Config):
        raise TypeError(f"{name} must be an Fp32Config or None, got {config!r}")
    return config
