"""`keep_in_fp32`: parameters that stay fp32, whatever casts the module around them.

Float16Module, `.to`, `.half`, `.bfloat16`, `to_empty` and EMA copies all go through `Module._apply`. The module gets a
guard: an `_apply` that leaves kept parameters fp32 and never rounds their values. Two marks for other packages are set:
`keep_in_fp32` on the parameter (megatron-core main, Megatron-LM#5929) and `_keep_in_float32_parameter_names` on the
module (Megatron-Bridge >= 0.6).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from megatron_fp32.kept_parameters.forward_dtypes import check_forward, note_on_forward, reset_in_params_dtype

_NAMES = "_keep_in_float32_parameter_names"
# Distinguishes a guarded module, because Megatron-Bridge sets `_NAMES` on modules without a guard.
_GUARD = "_has_fp32_guard"
# The names that `keep_in_fp32` was called with, so that `kept_problems` notices when the module of one was replaced.
_REQUESTED = "_kept_in_fp32_by_name"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptParameter:
    """A parameter as `keep_in_fp32` found it."""

    name: str
    previous_dtype: torch.dtype
    on_bf16_grid: bool | None
    """All values are exact in bfloat16, so they may have been rounded before. None on the meta device."""
    redrawn: bool = False
    """Afterwards the parameter was initialized again, in fp32."""
    note: str | None = None
    """Why keeping the parameter has less effect than it seems; None if it has its full effect."""


def keep_in_fp32(module: nn.Module, *names: str) -> tuple[KeptParameter, ...]:
    """Cast parameters of `module` to fp32 and keep them fp32.

    The class of the module that has a parameter is replaced by a subclass with the same name and a guard. Parameters,
    hooks, buffers and state-dict keys stay. Call `keep_in_fp32` before weights are loaded and before Float16Module, DDP
    and the first forward pass, because DDP's buffers and compiled code remember dtypes.

    Args:
        module: the module.
        names: parameter names within `module`, such as `"A_log"` or `"out_norm.weight"`. A parameter that is kept
            already stays as it is. If several modules under `module` share a parameter, each of them gets a guard.

    Returns:
        One entry for each name: its previous dtype, whether its values look rounded, and a note if keeping it has less
        effect than it seems. The note is a warning, too. Example: without `moe_router_dtype`, a router casts its weight
        to the dtype of its input.

    Raises:
        ValueError: when a name is not a parameter of the module, when a 16-bit parameter already belongs to DDP, or
            when the layer's forward pass fails with the parameter in fp32.
        TypeError: when a parameter is not a plain floating-point tensor, or the class of its module cannot get a guard
            (a ScriptModule). After any error the module is unchanged.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a module, got {type(module).__name__}: call keep_in_fp32 for each chunk of a model")
    if not names:
        raise ValueError("keep_in_fp32 needs at least one parameter name")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"keep_in_fp32 takes names, such as 'A_log', one argument each; got {names!r}")
    owners = [_resolve(module, name) for name in names]
    found = tuple(_look_at(owner, leaf, name) for name, (owner, leaf) in zip(names, owners, strict=True))
    with contextlib.ExitStack() as undo:
        for owner, leaf in owners:
            _keep_one(module, owner, leaf, undo)
        undo.pop_all()
    requested = vars(module).get(_REQUESTED, ())
    vars(module)[_REQUESTED] = (*requested, *(name for name in names if name not in requested))
    for kept in found:
        if kept.note is not None:
            warnings.warn(f"{kept.name}: {kept.note}", stacklevel=2)
    return found


def check_parameters(module: nn.Module, *names: str) -> None:
    """Raise the errors that `keep_in_fp32` would raise for these names."""
    for name in names:
        _resolve(module, name)


def kept_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every parameter under `model` that is kept in fp32."""
    for prefix, module in model.named_modules():
        for leaf in vars(module).get(_NAMES, ()):
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                yield (f"{prefix}.{leaf}" if prefix else leaf), parameter


def kept_problems(model: nn.Module) -> Iterator[str]:
    """One sentence for each kept parameter under `model` that is not kept any more."""
    for prefix, module in model.named_modules():
        for name in vars(module).get(_REQUESTED, ()):
            if not _is_kept_below(module, name):
                yield f"{f'{prefix}.{name}' if prefix else name} is not kept any more: its module was replaced"
        if not vars(module).get(_GUARD, False):
            continue
        where = prefix or type(module).__name__
        if not has_guard(module):
            yield f"{where} has lost its guard: a cast would round {', '.join(vars(module).get(_NAMES, ()))}"
        for leaf in vars(module).get(_NAMES, ()):
            if module._parameters.get(leaf) is None:
                yield f"{where}.{leaf} is not a parameter any more: it was removed, frozen or parametrized"


def _is_kept_below(module: nn.Module, name: str) -> bool:
    """Whether the module of the parameter `name`, or the module inside its LoRA wrapper, still keeps the parameter."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path) if path else module
    except AttributeError:
        return False
    return any(leaf in vars(inner).get(_NAMES, ()) for inner in owner.modules())


class Fp32ParameterGuard(nn.Module):
    """Mix-in with the guard for the parameters in `_keep_in_float32_parameter_names`. It must be the first base."""

    _keeps_fp32 = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return _guarded_apply(self, super()._apply, fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _guarded_load(self, super()._load_from_state_dict, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _mark_all(self)


def has_guard(module: nn.Module) -> bool:
    """Whether casts of the module leave its kept parameters fp32."""
    return getattr(type(module), "_keeps_fp32", False) and not {"_apply", "_load_from_state_dict"} & vars(module).keys()


def _guarded(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        leaf: parameter
        for leaf in vars(module).get(_NAMES, ())
        if (parameter := module._parameters.get(leaf)) is not None
    }


def _guarded_apply(module: nn.Module, apply: Callable[..., Any], fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
    before = _attributes(module)
    kept = {id(tensor) for p in _guarded(module).values() for tensor in (p, p.grad) if tensor is not None}

    def guarded(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if id(tensor) not in kept or result.dtype in (torch.float32, torch.float64):
            return result
        if tensor.is_meta:
            return torch.empty_like(tensor, dtype=torch.float32, device=result.device)
        return tensor.to(device=result.device, dtype=torch.float32)

    applied = apply(guarded, recurse)
    _carry_attributes(module, before)
    return applied


def _guarded_load(module: nn.Module, load: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    before = _attributes(module)
    load(*args, **kwargs)
    # load_state_dict(assign=True) replaces the parameter by the checkpoint's tensor, with the checkpoint's dtype.
    for leaf, parameter in _guarded(module).items():
        if parameter.dtype != torch.float32:
            module._parameters[leaf] = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
    _carry_attributes(module, before)


def _mark_all(module: nn.Module) -> None:
    for parameter in _guarded(module).values():
        parameter.keep_in_fp32 = True  # type: ignore[attr-defined]


def _attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {leaf: dict(vars(parameter)) for leaf, parameter in _guarded(module).items()}


def _carry_attributes(module: nn.Module, attributes: dict[str, dict[str, Any]]) -> None:
    """Put attributes such as `sequence_parallel` and `keep_in_fp32` on Parameters that a cast or load replaced."""
    for leaf, values in attributes.items():
        vars(module._parameters[leaf]).update(values)


def _resolve(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    if not isinstance(name, str):
        raise TypeError(f"expected parameter names, got {name!r} of type {type(name).__name__}")
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path) if path else module
    except AttributeError as error:
        raise ValueError(f"{type(module).__name__} has no submodule {path!r} for the parameter {name!r}") from error
    if isinstance(owner, torch.jit.ScriptModule):
        raise TypeError(
            f"{name!r} belongs to a ScriptModule, whose class cannot change: call keep_in_fp32 before torch.jit.script"
        )
    parameter = owner._parameters.get(leaf)
    if parameter is None:
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}{_why_no_parameter(module, owner, leaf)}")
    if isinstance(parameter, UninitializedTensorMixin) or isinstance(owner, LazyModuleMixin):
        raise TypeError(f"{name!r} has no shape yet: run the lazy {type(owner).__name__} once, then call keep_in_fp32")
    if type(parameter.data) is not torch.Tensor or not parameter.dtype.is_floating_point:
        raise TypeError(
            f"{name!r} must be a plain floating-point tensor to be kept in fp32, "
            f"got {type(parameter.data).__name__} of {parameter.dtype}"
        )
    in_ddp = any(isinstance(outer, nn.parallel.DistributedDataParallel) for outer in module.modules())
    if parameter.dtype != torch.float32 and (in_ddp or hasattr(parameter, "main_grad")):
        raise ValueError(
            f"{name!r} is {parameter.dtype} and already belongs to DistributedDataParallel: "
            "keep_in_fp32 must come before the model is wrapped"
        )
    check_forward(module, name)
    return owner, leaf


def _why_no_parameter(module: nn.Module, owner: nn.Module, leaf: str) -> str:
    if leaf in owner._buffers:
        return (
            ": it is a buffer, and only parameters are kept (megatron-core itself keeps a router's expert_bias in fp32)"
        )
    if parametrize.is_parametrized(owner, leaf):
        return f": it is parametrized; name 'parametrizations.{leaf}.original' of its module instead"
    return f"; it has: {', '.join(n for n, _ in module.named_parameters()) or 'none'}"


def _look_at(owner: nn.Module, leaf: str, name: str) -> KeptParameter:
    parameter = owner._parameters[leaf]
    assert parameter is not None
    return KeptParameter(
        name=name,
        previous_dtype=parameter.dtype,
        on_bf16_grid=None if parameter.is_meta else _on_bf16_grid(parameter.detach()),
        note=note_on_forward(owner, leaf),
    )


def _keep_one(module: nn.Module, owner: nn.Module, leaf: str, undo: contextlib.ExitStack) -> None:
    """Keep one parameter, and add to `undo` the callbacks that revert each step."""
    parameter: Any = owner._parameters[leaf]
    # A tied parameter belongs to several modules, and a cast of any of them would cast it.
    for other in list(module.modules()):
        for other_leaf, candidate in list(other._parameters.items()):
            if candidate is parameter:
                _guard(other, other_leaf, undo)
    if parameter.dtype != torch.float32:
        undo.callback(setattr, parameter, "data", parameter.data)
        parameter.data = parameter.data.float()
    if not hasattr(parameter, "keep_in_fp32"):
        undo.callback(vars(parameter).pop, "keep_in_fp32", None)
    parameter.keep_in_fp32 = True


def _guard(owner: nn.Module, leaf: str, undo: contextlib.ExitStack) -> None:
    undo.callback(_restore_attributes, owner, {key: vars(owner).get(key) for key in (_NAMES, _GUARD)})
    if not getattr(type(owner), "_keeps_fp32", False):
        before = type(owner)
        try:
            owner.__class__ = _guarded_class(before)  # type: ignore[assignment, arg-type]
        except Exception as error:
            raise TypeError(
                f"the class {before.__module__}.{before.__qualname__} cannot get a guard, so its {leaf!r} cannot be "
                f"kept in fp32: {error}"
            ) from error
        undo.callback(setattr, owner, "__class__", before)
    names = vars(owner).get(_NAMES, ())
    vars(owner)[_GUARD] = True
    vars(owner)[_NAMES] = names if leaf in names else (*names, leaf)


def _restore_attributes(owner: nn.Module, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if value is None:
            vars(owner).pop(key, None)
        else:
            vars(owner)[key] = value


def _on_bf16_grid(tensor: Tensor) -> bool:
    # NaN, which uninitialised memory may hold, is not equal to itself.
    values = tensor.float()
    return bool(((values.bfloat16().float() == values) | values.isnan()).all())


@functools.cache
def _guarded_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `base` alone, with its own copies of the methods of `Fp32ParameterGuard`.

    Python lets every instance of `base` change to such a subclass. With the mix-in as a second base, it would refuse
    classes whose first base is not a Module, such as megatron-core's `Router(ABC, MegatronModule)`: "object layout
    differs".
    """

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return _guarded_apply(self, super(guarded, self)._apply, fn, recurse)

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        _guarded_load(self, super(guarded, self)._load_from_state_dict, *args, **kwargs)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super(guarded, self).__setstate__(state)
        _mark_all(self)

    def reset_parameters(self: Any, *args: Any, **kwargs: Any) -> None:
        with reset_in_params_dtype(self):
            super(guarded, self).reset_parameters(*args, **kwargs)

    # Megatron-Bridge chooses a parameter's mapping by type(module).__name__, so the subclass has the base's name.
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__setstate__": __setstate__,
        "__reduce_ex__": _reduce_guarded,
        "_apply": _apply,
        "_load_from_state_dict": _load_from_state_dict,
        "_guarded_base": base,
        "_keeps_fp32": True,
    }
    if hasattr(base, "reset_parameters"):
        members["reset_parameters"] = reset_parameters
    guarded: Any = types.new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(members))
    return guarded  # type: ignore[no-any-return]


def _reduce_guarded(module: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle as (base class, state), because unpickling cannot find a class that was made at run time."""
    base = module._guarded_base
    if base.__reduce_ex__ is object.__reduce_ex__ and base.__reduce__ is object.__reduce__:
        return _rebuild_guarded, (base,), module.__getstate__()
    rebuild, arguments, *rest = base.__reduce_ex__(module, protocol)
    return _rebuild_and_guard, (rebuild, arguments), *rest


def _rebuild_guarded(base: type[nn.Module]) -> nn.Module:
    guarded: type[nn.Module] = _guarded_class(base)  # type: ignore[arg-type]
    return guarded.__new__(guarded)


def _rebuild_and_guard(rebuild: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = rebuild(*arguments)
    if not getattr(type(module), "_keeps_fp32", False):
        module.__class__ = _guarded_class(type(module))  # type: ignore[assignment, arg-type]
    return module
