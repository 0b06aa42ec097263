"""Parameters that are fp32 from construction on, whatever is done to the module around them.

Float16Module, `.to`, `.half`, `.bfloat16`, `to_empty` and EMA copies all go through `Module._apply`; a guarded module
answers it with fp32 for the parameters that it keeps, without ever rounding their values on the way. The marks that
others read are set as well: `keep_in_fp32` on the parameter (megatron-core main, Megatron-LM#5929) and
`_keep_in_float32_parameter_names` on the module (Megatron-Bridge >= 0.6).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = "_keep_in_float32_parameter_names"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptParameter:
    """What `keep_in_fp32` found when it took a parameter over."""

    name: str
    previous_dtype: torch.dtype
    on_bf16_grid: bool | None
    """All values are representable in bfloat16, so they may have been rounded before. None on the meta device."""
    redrawn: bool = False
    """It was initialized again, in fp32, after that."""


def keep_in_fp32(module: nn.Module, *names: str) -> tuple[KeptParameter, ...]:
    """Make parameters of `module` fp32 and keep them so.

    The module's class is replaced by a subclass of the same name that guards them; parameters, hooks, buffers and
    state-dict keys are the same objects as before. Call it before weights are loaded and before Float16Module, DDP and
    the first forward pass: compiled code and DDP's buffers remember the dtype that they saw.

    Args:
        names: parameter names relative to `module`, such as `"A_log"` or `"out_norm.weight"`. A parameter that is
            kept already stays as it is. Where modules under `module` share it, each of them is guarded.

    Returns:
        one entry a name: the dtype it had, and whether its values look rounded.

    Raises:
        ValueError: when a name is no parameter of the module, or DDP already owns a 16-bit one.
        TypeError: when a parameter is not a plain floating-point tensor.
    """
    if not names:
        raise ValueError("keep_in_fp32 needs at least one parameter name")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"keep_in_fp32 takes names, such as 'A_log', one argument each; got {names!r}")
    owners = [_resolve(module, name) for name in names]
    return tuple(_keep_one(module, owner, leaf, name) for name, (owner, leaf) in zip(names, owners, strict=True))


def check_parameters(module: nn.Module, *names: str) -> None:
    """Raise what `keep_in_fp32` would raise for these names."""
    for name in names:
        _resolve(module, name)


def kept_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every parameter under `model` that is kept in fp32."""
    for prefix, module in model.named_modules():
        for leaf in vars(module).get(_NAMES, ()):
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                yield (f"{prefix}.{leaf}" if prefix else leaf), parameter


class Fp32ParameterGuard(nn.Module):
    """Mix-in, first among the bases, that keeps the parameters named in `_keep_in_float32_parameter_names` fp32."""

    def _guarded(self) -> dict[str, nn.Parameter]:
        return {
            leaf: parameter
            for leaf in vars(self).get(_NAMES, ())
            if (parameter := self._parameters.get(leaf)) is not None
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self._attributes()
        kept = {id(tensor) for p in self._guarded().values() for tensor in (p, p.grad) if tensor is not None}

        def guarded(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) not in kept or result.dtype in (torch.float32, torch.float64):
                return result
            if tensor.is_meta:
                return torch.empty_like(tensor, dtype=torch.float32, device=result.device)
            return tensor.to(device=result.device, dtype=torch.float32)

        applied = super()._apply(guarded, recurse)
        self._carry_attributes(before)
        return applied

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self._attributes()
        super()._load_from_state_dict(*args, **kwargs)
        # assign=True puts the checkpoint's own tensor in place, in its own dtype.
        for leaf, parameter in self._guarded().items():
            if parameter.dtype != torch.float32:
                self._parameters[leaf] = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
        self._carry_attributes(before)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for parameter in self._guarded().values():
            parameter.keep_in_fp32 = True  # type: ignore[attr-defined]

    def _attributes(self) -> dict[str, dict[str, Any]]:
        return {leaf: dict(vars(parameter)) for leaf, parameter in self._guarded().items()}

    def _carry_attributes(self, attributes: dict[str, dict[str, Any]]) -> None:
        """A new Parameter, or one whose contents were swapped, lacks `tensor_model_parallel`, `sequence_parallel`
        and our mark."""
        for leaf, values in attributes.items():
            vars(self._parameters[leaf]).update(values)


def _resolve(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{type(module).__name__} has no submodule {path!r} for the parameter {name!r}") from error
    parameter = owner._parameters.get(leaf)
    if parameter is None:
        available = ", ".join(n for n, _ in module.named_parameters()) or "none"
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}; it has: {available}")
    if type(parameter.data) is not torch.Tensor or not parameter.dtype.is_floating_point:
        raise TypeError(
            f"{name!r} must be a plain floating-point tensor to be kept in fp32, "
            f"got {type(parameter.data).__name__} of {parameter.dtype}"
        )
    if parameter.dtype != torch.float32 and hasattr(parameter, "main_grad"):
        raise ValueError(
            f"{name!r} is {parameter.dtype} and already belongs to DistributedDataParallel: "
            "keep_in_fp32 must come before the model is wrapped"
        )
    return owner, leaf


def _keep_one(module: nn.Module, owner: nn.Module, leaf: str, name: str) -> KeptParameter:
    parameter = owner._parameters[leaf]
    assert parameter is not None
    found = KeptParameter(
        name=name,
        previous_dtype=parameter.dtype,
        on_bf16_grid=None if parameter.is_meta else _on_bf16_grid(parameter.detach()),
    )
    if parameter.dtype != torch.float32:
        parameter.data = parameter.data.float()
    parameter.keep_in_fp32 = True  # type: ignore[attr-defined]
    # A tied parameter has several owners, and the cast of any of them would reach it.
    for other in list(module.modules()):
        for other_leaf, candidate in list(other._parameters.items()):
            if candidate is parameter:
                _guard(other, other_leaf)
    return found


def _guard(owner: nn.Module, leaf: str) -> None:
    names = vars(owner).get(_NAMES, ())
    if leaf not in names:
        setattr(owner, _NAMES, (*names, leaf))
    if not isinstance(owner, Fp32ParameterGuard):
        owner.__class__ = _guarded_class(type(owner))  # type: ignore[arg-type]


def _on_bf16_grid(tensor: Tensor) -> bool:
    # Uninitialised memory may hold NaN, which is not equal to itself.
    values = tensor.float()
    return bool(((values.bfloat16().float() == values) | values.isnan()).all())


@functools.cache
def _guarded_class(base: type[nn.Module]) -> type[nn.Module]:
    # Megatron-Bridge chooses a parameter's mapping by type(module).__name__, so the name stays the base's.
    return type(
        base.__name__,
        (Fp32ParameterGuard, base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__reduce_ex__": _reduce_guarded,
            "_guarded_base": base,
        },
    )


def _reduce_guarded(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle as (base class, state): a class made at run time cannot be found by its name."""
    return _rebuild_guarded, (module._guarded_base,), module.__getstate__()


def _rebuild_guarded(base: type[nn.Module]) -> nn.Module:
    guarded: type[nn.Module] = _guarded_class(base)  # type: ignore[arg-type]
    return guarded.__new__(guarded)
