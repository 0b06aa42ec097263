"""Gated delta net whose `A_log` and `out_norm` are fp32 from construction on.

Stock megatron-core differs in three ways:

- It draws `A_log`, and takes its logarithm, in `params_dtype`.
- Float16Module rounds both parameters.
- Without sequence parallelism, the gradient of `out_norm` only covers the local heads (Megatron-LM#7452).
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
"""Values of `experimental_attention_variant` for these layers: up to megatron-core 0.19.2, and on its main branch."""


class Fp32GatedDeltaNet(Fp32ParameterGuard, GatedDeltaNet):
    """`GatedDeltaNet` with kept fp32 parameters and the right gradient for `out_norm`.

    Args:
        fp32_parameters: names, within the layer, of the parameters to keep in fp32. `dt_bias` stays in `params_dtype`
            unless you name it, as in the released checkpoints. The forward pass cannot use other parameters in fp32
            (`GATED_DELTA_NET_FP32_PARAMETERS`).
        *args, **kwargs: arguments of `GatedDeltaNet`.

    Attributes:
        fp32_calls: number of forward passes in which every kept parameter was fp32; `check_fp32` reads it.

    Raises:
        ValueError: when a name is not a parameter of the layer.
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
        # The parent's constructor calls reset_parameters, which reads this attribute.
        if isinstance(fp32_parameters, str):
            raise TypeError(f"fp32_parameters must be a tuple of names, got {fp32_parameters!r}")
        object.__setattr__(self, "_fp32_parameters", tuple(fp32_parameters))
        super().__init__(*args, **kwargs)
        self.fp32_calls = 0
        self._hook: RemovableHandle | None = None

    def extra_repr(self) -> str:
        """The fp32 parameters, for `print(model)`: the class name is megatron-core's."""
        return f"fp32_parameters={self._fp32_parameters}"

    def reset_parameters(self) -> None:
        """Initialize as megatron-core does, then draw `A_log` again in fp32 if it is kept."""
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
        """Replace Transformer Engine's norm by `RMSNorm` of this package, with its Parameter and state-dict keys.

        With an fp32 weight, Transformer Engine's norm returns fp32. Writing that to memory for the gate costs 4 % of
        the layer's time at 32 thousand tokens. `RMSNorm` is compiled into one function with the gate.
        """
        norm = self.out_norm
        stock = type(norm).__module__.startswith("transformer_engine.") and self.config.normalization == "RMSNorm"
        if stock and "out_norm.weight" in self._fp32_parameters:
            with torch.device("meta"):
                own = RMSNorm(self.config, self.value_head_dim, self.config.layernorm_epsilon)
            own.weight = norm.get_parameter("weight")
            self.out_norm = own

    def _apply_gated_norm(self, x: Tensor, gate: Tensor) -> Tensor:
        # megatron-core compiles this method. DDP with overlap_param_gather puts a different hook on every module, so a
        # norm that is called in compiled code would be compiled again for every layer, until Dynamo gives up.
        if isinstance(self.out_norm, RMSNorm):
            return self.out_norm(x, gate, self.act_fn)
        return super()._apply_gated_norm(x, gate)

    def _tracker_state(self) -> Tensor:
        with get_cuda_rng_tracker().fork():
            return _generator(self.get_parameter("A_log").device).get_state()

    def _state_for_another_a_log(self) -> Tensor:
        """A random state for drawing `A_log` again, when the state before the 16-bit draw is not known any more.

        It is computed from the tracker, the drawn values and the layer's number. So ranks with one shard of the layer
        get one state, and other shards, layers and seeds get other states.
        """
        a_log = self.get_parameter("A_log").detach()
        known = [a_log.float().cpu().numpy().tobytes(), self._tracker_state().numpy().tobytes(), str(self.layer_number)]
        digest = hashlib.sha256(b"".join(part.encode() if isinstance(part, str) else part for part in known)).digest()
        # 63 bits: manual_seed refuses larger numbers on some devices.
        return torch.Generator(a_log.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1).get_state()

    def _draw_a_log(self, start: Tensor) -> None:
        """Draw `A_log` in fp32 from the random state `start`.

        The tracker's state is put back afterwards, so that later draws (other layers, other chunks, dropout) equal
        stock megatron-core's.
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
        """The parent's forward pass, counted in `fp32_calls` if every kept parameter is fp32."""
        self._sum_out_norm_grad_over_tp()
        output = super().forward(*args, **kwargs)
        if all(self.get_parameter(name).dtype == torch.float32 for name in self._fp32_parameters):
            count_fp32_call(self)
        return output

    def _sum_out_norm_grad_over_tp(self) -> None:
        """Register a hook that sums the gradient of `out_norm.weight` over the tensor-parallel ranks.

        The weight is replicated, and each rank only computes the gradient of its own heads. With sequence parallelism,
        finalize_model_grads sums the gradient, because the norm marks its weight; otherwise megatron-core does not.
        A hook on the Parameter works with every implementation of the norm. It is registered here, not in the
        constructor, because deepcopy, pickle and `to_empty` make new Parameters without hooks.
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
        """A copy that shares the process groups. They cannot be copied, so stock layers cannot be copied either."""
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
    """Raise the errors that `to_fp32_gated_delta_net` would raise for this layer and these names."""
    if type(layer) not in (GatedDeltaNet, Fp32GatedDeltaNet):
        raise TypeError(
            f"expected a {GatedDeltaNet.__module__}.GatedDeltaNet, got {type(layer).__module__}."
            f"{type(layer).__qualname__}: a subclass may use its parameters in its own way"
        )
    check_parameters(layer, *names)


def to_fp32_gated_delta_net(
    layer: GatedDeltaNet, names: tuple[str, ...] = DEFAULT_KEPT_PARAMETERS, *, weights: Weights
) -> tuple[KeptParameter, ...]:
    """Turn a built `GatedDeltaNet` into an `Fp32GatedDeltaNet`, in place. A second call changes nothing.

    Args:
        layer: the layer, before Float16Module, DDP and the first forward pass.
        names: names, within the layer, of the parameters to keep in fp32.
        weights: `"initialized"` draws `A_log` again in fp32 if megatron-core drew it in 16 bits
            (`config.perform_initialization`); `"loaded"` keeps its values.

    Returns:
        One entry for each parameter: its previous dtype, whether its values look rounded, whether it was drawn again.

    Raises:
        TypeError: for a subclass, which may use its parameters in its own way.
        ValueError: when a name is not a parameter of the layer, or is one that the forward pass cannot use in fp32;
            for another value of `weights`.
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
