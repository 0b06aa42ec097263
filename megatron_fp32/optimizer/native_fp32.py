"""What released megatron-core optimizers need for parameters that are fp32 in the model.

Training works without any of this; the first checkpoint does not. Each repair is probed for on tiny tensors, so it is
installed only where this megatron-core needs it, and the handle that `install_optimizer_repairs` returns takes all of
them back.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from megatron_fp32.optimizer import probes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair:
    """One fault of a released optimizer."""

    name: str
    symptom: str
    """What happens without the repair."""
    upstream: str
    """Where it is, or will be, fixed in Megatron-LM."""
    needed: bool
    """This megatron-core has the fault, so the repair was installed."""


class OptimizerRepairs:
    """The repairs that were installed. Use it as a context manager, or call `undo`.

    Attributes:
        report: every known repair, with whether it was needed.
    """

    def __init__(self, report: tuple[Repair, ...], undo: contextlib.ExitStack) -> None:
        self.report = report
        self._undo = undo

    @property
    def installed(self) -> tuple[str, ...]:
        """Names of the repairs that were needed."""
        return tuple(repair.name for repair in self.report if repair.needed)

    def undo(self) -> None:
        """Put megatron-core back as it was. A second call does nothing."""
        self._undo.close()

    def __enter__(self) -> OptimizerRepairs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def install_optimizer_repairs() -> OptimizerRepairs:
    """Repair the optimizers of the installed megatron-core for native-fp32 parameters.

    Call it before the optimizer is built. It changes methods of `DistributedOptimizer` and
    `Float16OptimizerWithFloat16Params`; models without native-fp32 parameters see no difference. Where a repair is
    installed already, the new handle does not install it again.
    """
    undo = contextlib.ExitStack()
    report = []
    for repair, install in _repairs():
        report.append(repair)
        if repair.needed:
            undo.enter_context(install())
    return OptimizerRepairs(tuple(report), undo)


def pending_repairs(optimizer: Any) -> tuple[Repair, ...]:
    """The repairs that this megatron-core optimizer needs for native-fp32 parameters and that are not installed."""
    if isinstance(optimizer, DistributedOptimizer):
        families: tuple[str, ...] = ("distributed-", "torch-adam-")
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        families = ("float16-",)
    else:
        return ()
    return tuple(repair for repair, _ in _repairs() if repair.needed and repair.name.startswith(families))


def _repairs() -> Iterator[tuple[Repair, Callable[[], contextlib.AbstractContextManager[None]]]]:
    yield (
        Repair(
            name="distributed-leaf-shards",
            symptom="load: 'a view of a leaf Variable that requires grad is being used in an in-place operation'",
            upstream="Megatron-LM#6982",
            needed=not probes.shards_are_leaves(),
        ),
        _leaf_shards,
    )
    yield (
        Repair(
            name="distributed-index-map",
            symptom="save: the state of one parameter is written under the name of another",
            upstream="Megatron-LM#5835",
            needed=not probes.index_map_follows_groups(),
        ),
        _index_map,
    )
    yield (
        Repair(
            name="float16-id-map",
            symptom="save: 'Optimizer shape does not match model shape', or swapped states where shapes are equal",
            upstream="Megatron-LM#5929",
            needed=not probes.float16_ids_count_fp32(),
        ),
        _float16_id_map,
    )
    yield (
        Repair(
            name="torch-adam-no-state",
            symptom="load: AssertionError before the first step, with torch's Adam",
            upstream="none",
            needed=not probes.state_dict_works_before_first_step(),
        ),
        _zero_state_before_first_step,
    )
    yield (
        Repair(
            name="torch-adam-step-missing",
            symptom="load of fully_reshardable: KeyError 'step', with torch's Adam",
            upstream="none",
            needed=not probes.accepts_states_without_step(),
        ),
        _keep_step_when_missing,
    )
    yield (
        Repair(
            name="torch-adam-shared-step",
            symptom="resume: all parameters share one step, which advances once for each of them, with torch's Adam",
            upstream="none",
            needed=not probes.loaded_steps_are_separate(),
        ),
        _separate_steps,
    )


# The repairs. Each is a context manager that replaces one method.


@contextlib.contextmanager
def _replaced(owner: type, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` is `make(what it was)` inside the block, and the very same object again after it."""
    original = vars(owner)[name]
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _leaf_shards() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        build = original.__func__

        @functools.wraps(build)
        def repaired(cls: Any, gbuf_ranges: Any, param_gbuf_map: Any, opt_group_ranges: Any, config: Any) -> Any:
            built = build(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
            for group_range, shards in zip(opt_group_ranges, built[3], strict=True):
                params = group_range["orig_group"]["params"]
                for i, shard in enumerate(shards):
                    # detach(), not no_grad(): a view made under no_grad must not be modified in place later.
                    leaf = shard.detach()
                    vars(leaf).update(vars(shard))
                    shards[i] = leaf
                    params[next(j for j, p in enumerate(params) if p is shard)] = leaf
            return built

        return classmethod(repaired)

    return _replaced(DistributedOptimizer, "_build_model_and_main_param_groups", make)


def _index_map() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            # Absent for a stub optimizer and for Megatron-FSDP.
            groups = zip(getattr(self, "model_fp32_groups", ()), getattr(self, "model_float16_groups", ()), strict=True)
            for group_index, (fp32, float16) in enumerate(groups):
                for order, param in enumerate([*fp32, *float16]):
                    self.model_param_group_index_map[param] = (group_index, order)

        return repaired

    return _replaced(DistributedOptimizer, "__init__", make)


def _float16_id_map() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(self.fp32_from_fp32_groups):
                return original(self, *args, **kwargs)
            model_of = {
                id(main): model
                for mains, models in zip(self.fp32_from_float16_groups, self.float16_groups, strict=True)
                for main, model in zip(mains, models, strict=True)
            }
            groups = [list(group["params"]) for group in self.optimizer.param_groups]
            stock = self.float16_groups, self.fp32_from_float16_groups
            # The original numbers float16_groups; with every parameter of the inner optimizer in it, in the inner
            # optimizer's order, its numbers are right.
            self.float16_groups = [[model_of.get(id(p), p) for p in group] for group in groups]
            self.fp32_from_float16_groups = groups
            try:
                state_dict = original(self, *args, **kwargs)
            finally:
                self.float16_groups, self.fp32_from_float16_groups = stock
            # A native-fp32 parameter is its own main parameter; the model's state dict holds it.
            state_dict["fp32_from_fp16_params"] = [
                [entry for entry, p in zip(entries, group, strict=True) if id(p) in model_of]
                for entries, group in zip(state_dict["fp32_from_fp16_params"], groups, strict=True)
            ]
            return state_dict

        return repaired

    return _replaced(Float16OptimizerWithFloat16Params, "sharded_state_dict", make)


def _zero_state_before_first_step() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any) -> Any:
            inner = self.optimizer
            if isinstance(inner, torch.optim.Adam) and not inner.state:
                for group in inner.param_groups:
                    for param in group["params"]:
                        inner.state[param] = _adam_zero_state(param, group)
            return original(self)

        return repaired

    return _replaced(DistributedOptimizer, "state_dict", make)


def _keep_step_when_missing() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
            group_index, order = self.model_param_group_index_map[model_param]
            main = self.optimizer.param_groups[group_index]["params"][order]
            step = self.optimizer.state[main].get("step")
            if isinstance(step, Tensor) and "step" not in tensors:
                # It travels in the parameter groups, and load_state_dict has set it from there.
                tensors = {**tensors, "step": step.clone()}
            original(self, model_param, tensors)

        return repaired

    return _replaced(DistributedOptimizer, "_set_main_param_and_optimizer_states", make)


def _separate_steps() -> contextlib.AbstractContextManager[None]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, state_dict: Any) -> None:
            original(self, state_dict)
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    state = self.optimizer.state[param]
                    if "step" in group and isinstance(state.get("step"), Tensor):
                        # The groups carry what was saved. dp_reshardable has just copied the step of before the
                        # load over it.
                        state["step"] = torch.full_like(state["step"], float(group["step"]))

        return repaired

    return _replaced(DistributedOptimizer, "load_state_dict", make)


def _adam_zero_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """What `torch.optim.Adam` makes at its first step, before it."""
    on_device = group.get("capturable") or group.get("fused")
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu"),
        "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
    }
    if group.get("amsgrad"):
        state["max_exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state
