"""Gated delta net whose `A_log` and `out_norm` are fp32 from construction on.

Stock megatron-core draws `A_log` and takes its logarithm in `params_dtype`, rounds both parameters in Float16Module,
and (without sequence parallel) trains `out_norm` with a gradient that saw only the local heads (Megatron-LM#7452).
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import copy
import dataclasses
import hashlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_fp32.config import DEFAULT_KEPT_PARAMETERS, Weights, check_weights
from megatron_fp32.gated_delta_net.norm import RMSNorm
from megatron_fp32.kept_parameters.forward_dtypes import reset_in_params_dtype
from megatron_fp32.kept_parameters.fp32_calls import count_fp32_call
from megatron_fp32.kept_parameters.keep_in_fp32 import (
    Fp32ParameterGuard,
    KeptParameter,
    check_parameters,
    keep_in_fp32,
)

VARIANTS = ("gated_delta_net", "gdn")
"""What `experimental_attention_variant` calls these layers: up to 0.19.2, and on main, which renames the former."""


class Fp32GatedDeltaNet(Fp32ParameterGuard, GatedDeltaNet):
    """`GatedDeltaNet` with kept fp32 parameters and the right gradient for `out_norm`.

    Args:
        fp32_parameters: what to keep, relative to the layer. `dt_bias` stays in `params_dtype` unless it is named, as
            in the released checkpoints. The forward pass takes no other parameter in fp32 (`GATED_DELTA_NET_TAKES`).
        *args, **kwargs: those of `GatedDeltaNet`.

    Attributes:
        fp32_calls: forward passes in which every kept parameter was fp32, for proving that it held.

    Raises:
        ValueError: when a name is no parameter of the layer.
    """

    fp32_calls: int
    config: TransformerConfig
    out_norm: nn.Module
    pg_collection: ProcessGroupCollection
    A_init_range: tuple[float, float]
    conv_init: float | None
    conv1d: nn.Conv1d
    A_log: nn.Parameter
    value_head_dim: int
    _fp32_parameters: tuple[str, ...]

    def __init__(self, *args: Any, fp32_parameters: tuple[str, ...] = DEFAULT_KEPT_PARAMETERS, **kwargs: Any) -> None:
        # The parent's constructor ends in reset_parameters, which reads this.
        if isinstance(fp32_parameters, str):
            raise TypeError(f"fp32_parameters must be a tuple of names, got {fp32_parameters!r}")
        object.__setattr__(self, "_fp32_parameters", tuple(fp32_parameters))
        super().__init__(*args, **kwargs)
        self.fp32_calls = 0
        self._hook: RemovableHandle | None = None

    def extra_repr(self) -> str:
        """The parameters that are fp32: the class keeps megatron-core's name."""
        return f"fp32_parameters={self._fp32_parameters}"

    def reset_parameters(self) -> None:
        """Initialize as megatron-core does, then draw `A_log` again in fp32 where it is kept."""
        draws = "A_log" in self._fp32_parameters and self.config.perform_initialization and not self.A_log.is_meta
        start = self._tracker_state() if draws else None
        with reset_in_params_dtype(self):
            super().reset_parameters()
        if not self._fp32_parameters:
            return
        self._take_norm_from_transformer_engine()
        keep_in_fp32(self, *self._fp32_parameters)
        if start is not None:
            self._draw_a_log(start)

    def _take_norm_from_transformer_engine(self) -> None:
        """Put our norm in its place, with the same Parameter and state-dict keys.

        With an fp32 weight theirs returns fp32, and writing that to memory for the gate costs 4 % of the layer at 32
        thousand tokens. Ours is compiled into one function with the gate.
        """
        norm = self.out_norm
        theirs = type(norm).__module__.startswith("transformer_engine.") and self.config.normalization == "RMSNorm"
        if theirs and "out_norm.weight" in self._fp32_parameters:
            with torch.device("meta"):
                own = RMSNorm(self.config, self.value_head_dim, self.config.layernorm_epsilon)
            own.weight = norm.get_parameter("weight")
            self.out_norm = own

    def _apply_gated_norm(self, x: Tensor, gate: Tensor) -> Tensor:
        # megatron-core compiles this method. DDP with overlap_param_gather hooks every module, each in its own way, and
        # a norm that is called in compiled code would make it compile anew for every layer, until Dynamo gives up.
        if isinstance(self.out_norm, RMSNorm):
            return self.out_norm(x, gate, self.act_fn)
        return super()._apply_gated_norm(x, gate)

    def _tracker_state(self) -> Tensor:
        with get_cuda_rng_tracker().fork():
            return _generator(self.get_parameter("A_log").device).get_state()

    def _state_for_another_a_log(self) -> Tensor:
        """A random state for an `A_log` that was drawn in 16 bits, when the state before that draw is gone.

        It follows from the tracker, the values that were drawn and the layer's number: ranks that hold the same part of
        the layer get the same one, and other parts, layers and seeds get others.
        """
        a_log = self.get_parameter("A_log").detach()
        known = [a_log.float().cpu().numpy().tobytes(), self._tracker_state().numpy().tobytes(), str(self.layer_number)]
        digest = hashlib.sha256(b"".join(part.encode() if isinstance(part, str) else part for part in known)).digest()
        # 63 bits: manual_seed takes no larger number on every device.
        return torch.Generator(a_log.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1).get_state()

    def _draw_a_log(self, start: Tensor) -> None:
        """Draw `A_log` in fp32 from the random state `start`.

        The tracker ends where it was, so that what is drawn later (other layers, other chunks, dropout) is stock's.
        """
        a_log = self.get_parameter("A_log")
        with get_cuda_rng_tracker().fork(), torch.no_grad():
            generator = _generator(a_log.device)
            end = generator.get_state()
            generator.set_state(start)
            if self.conv_init is not None:
                torch.empty_like(self.conv1d.weight).uniform_()  # the parent draws it before A_log
            a_log.uniform_(*self.A_init_range).log_()
            generator.set_state(end)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the parent; counts the pass when every kept parameter is fp32."""
        self._sum_out_norm_grad_over_tp()
        output = super().forward(*args, **kwargs)
        if all(self.get_parameter(name).dtype == torch.float32 for name in self._fp32_parameters):
            count_fp32_call(self)
        return output

    def _sum_out_norm_grad_over_tp(self) -> None:
        """`out_norm.weight` is replicated over the tensor-parallel ranks, each of which sees only its own heads.

        With sequence parallel finalize_model_grads already sums its gradient, because the norm marks its weight.
        Otherwise nobody does. A hook on the Parameter serves every implementation of the norm; it is set here, not in
        the constructor, because deepcopy, pickle and `to_empty` make new Parameters without hooks.
        """
        weight = self.out_norm.get_parameter("weight")
        if self.tp_size == 1 or not weight.requires_grad:
            return
        if self._hook is not None and self._hook.id in (weight._backward_hooks or {}):
            return
        if self.config.sequence_parallel and getattr(weight, "sequence_parallel", False):
            return
        group = self.pg_collection.tp

        def sum_over_tp(grad: Tensor) -> Tensor:
            total = grad.to(torch.float32, copy=True)
            dist.all_reduce(total, group=group)
            return total.to(grad.dtype)

        self._hook = weight.register_hook(sum_over_tp)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hook": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp32GatedDeltaNet:
        """The copy shares the process groups, which cannot be copied (stock layers cannot be either, for that)."""
        memo.update({id(g): g for g in vars(self.pg_collection).values() if isinstance(g, dist.ProcessGroup)})
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


def _generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def check_gated_delta_net(layer: GatedDeltaNet, names: tuple[str, ...]) -> None:
    """Raise what `to_fp32_gated_delta_net` would raise for this layer and these names."""
    if type(layer) not in (GatedDeltaNet, Fp32GatedDeltaNet):
        raise TypeError(
            f"expected a {GatedDeltaNet.__module__}.GatedDeltaNet, got {type(layer).__module__}."
            f"{type(layer).__qualname__}: a subclass may use its parameters in its own way"
        )
    check_parameters(layer, *names)


def to_fp32_gated_delta_net(
    layer: GatedDeltaNet, names: tuple[str, ...] = DEFAULT_KEPT_PARAMETERS, *, weights: Weights
) -> tuple[KeptParameter, ...]:
    """Turn a built `GatedDeltaNet` into an `Fp32GatedDeltaNet`, in place. Doing it again changes nothing.

    Args:
        layer: before Float16Module, DDP and the first forward pass.
        names: what to keep, relative to the layer.
        weights: `"initialized"` draws `A_log` again in fp32 where megatron-core has drawn it in 16 bits
            (`config.perform_initialization`); `"loaded"` leaves its values as they are.

    Returns:
        what was found of each parameter, and whether it was drawn again.

    Raises:
        TypeError: for a subclass, which may use its parameters in its own way.
        ValueError: when a name is no parameter of the layer, or none that its forward pass takes in fp32; for another
            value of `weights`.
    """
    check_weights(weights)
    check_gated_delta_net(layer, names)
    if not isinstance(layer, Fp32GatedDeltaNet):
        layer.__class__ = Fp32GatedDeltaNet
        layer.fp32_calls, layer._hook = 0, None
    layer._fp32_parameters = tuple(names)
    layer._take_norm_from_transformer_engine()
    found = {kept.name: kept for kept in keep_in_fp32(layer, *names)}
    a_log = found.get("A_log")
    drawn_in_16_bits = a_log is not None and a_log.previous_dtype != torch.float32 and not layer.A_log.is_meta
    if weights == "initialized" and drawn_in_16_bits and layer.config.perform_initialization:
        layer._draw_a_log(layer._state_for_another_a_log())
        found["A_log"] = dataclasses.replace(found["A_log"], redrawn=True)
    return tuple(found.values())


# Megatron-Bridge chooses a mapping by type(module).__name__; pickle finds the class by its __qualname__.
Fp32GatedDeltaNet.__name__ = GatedDeltaNet.__name__
