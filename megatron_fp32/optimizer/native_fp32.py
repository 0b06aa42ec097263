"""Repairs of released megatron-core optimizers for native-fp32 parameters: parameters that are fp32 in the model.

Training works without the repairs, but checkpoints of the optimizer do not. A probe on tiny tensors finds out whether
the installed megatron-core needs a repair, and only then is it installed. The handle that `install_optimizer_repairs`
returns undoes all repairs.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_fp32.optimizer import distributed, float16, probes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair:
    """A fault of a released optimizer, and whether its repair was installed."""

    name: str
    symptom: str
    """The error or the wrong result without the repair."""
    upstream: str
    """The pull request or issue in Megatron-LM that fixes the fault; "none" if there is none."""
    needed: bool
    """The installed megatron-core has the fault, so the repair was installed."""


class OptimizerRepairs:
    """The handle of the installed repairs. Use it as a context manager, or call `undo`.

    Attributes:
        report: every known repair, and whether it was needed.
    """

    def __init__(self, report: tuple[Repair, ...], undo: contextlib.ExitStack) -> None:
        self.report = report
        self._undo = undo

    @property
    def installed(self) -> tuple[str, ...]:
        """Names of the repairs that were needed."""
        return tuple(repair.name for repair in self.report if repair.needed)

    def undo(self) -> None:
        """Put megatron-core's own methods back. A second call does nothing."""
        self._undo.close()

    def __enter__(self) -> OptimizerRepairs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def install_optimizer_repairs() -> OptimizerRepairs:
    """Repair the optimizers of the installed megatron-core for native-fp32 parameters.

    Call it before the optimizer is built. It replaces methods of `DistributedOptimizer` and
    `Float16OptimizerWithFloat16Params`. For models without native-fp32 parameters, nothing changes. A repair that is
    installed already is not installed again, and the new handle does not undo it.
    """
    undo = contextlib.ExitStack()
    report = []
    for repair, install in _repairs():
        report.append(repair)
        if repair.needed:
            undo.enter_context(install())
    return OptimizerRepairs(tuple(report), undo)


def pending_repairs(optimizer: Any) -> tuple[Repair, ...]:
    """The repairs that this optimizer needs for native-fp32 parameters and that are not installed."""
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
        distributed.leaf_shards,
    )
    yield (
        Repair(
            name="distributed-index-map",
            symptom="save: the state of one parameter is written under the name of another",
            upstream="Megatron-LM#5835",
            needed=not probes.index_map_follows_groups(),
        ),
        distributed.index_map,
    )
    yield (
        Repair(
            name="float16-id-map",
            symptom="save: 'Optimizer shape does not match model shape', or swapped states if shapes are equal",
            upstream="Megatron-LM#5929",
            needed=not probes.float16_ids_count_fp32(),
        ),
        float16.id_map,
    )
    yield (
        Repair(
            name="torch-adam-no-state",
            symptom="load: AssertionError before the first step, with torch's Adam",
            upstream="none",
            needed=not probes.state_dict_works_before_first_step(),
        ),
        distributed.zero_state_before_first_step,
    )
    yield (
        Repair(
            name="torch-adam-step-missing",
            symptom="load of fully_reshardable: KeyError 'step', with torch's Adam",
            upstream="none",
            needed=not probes.accepts_states_without_step(),
        ),
        distributed.keep_step_when_missing,
    )
    yield (
        Repair(
            name="torch-adam-shared-step",
            symptom="resume: all parameters share one step, which advances once for each of them, with torch's Adam",
            upstream="none",
            needed=not probes.loaded_steps_are_separate(),
        ),
        distributed.separate_steps,
    )
    yield (
        Repair(
            name="distributed-bucket-padding",
            symptom="save of fully_reshardable, with several buckets: states are shifted, with zeros at the end",
            upstream="none",
            needed=not probes.bucket_padding_is_left_out(),
        ),
        distributed.bucket_padding,
    )
    yield (
        Repair(
            name="distributed-empty-part",
            symptom="save of dp_reshardable: 'empty bucket encountered', if a rank's shard of a bucket is padding",
            upstream="none",
            needed=not probes.parts_may_be_padding(),
        ),
        distributed.shards_without_parameters,
    )
    yield (
        Repair(
            name="distributed-gather-after-load",
            symptom="load of a checkpoint of a 16-bit run: ranks have different values of a native-fp32 parameter",
            upstream="none",
            needed=not probes.load_gathers_parameters(),
        ),
        distributed.fp32_parameters_after_load,
    )
    yield (
        Repair(
            name="float16-empty-group",
            symptom="load: 'Cannot merge two lists', with a parameter group that has no 16-bit parameters on a rank",
            upstream="none",
            needed=not probes.float16_groups_may_be_empty(),
        ),
        float16.groups_by_number,
    )
    yield (
        Repair(
            name="float16-native-masters",
            symptom="load of a checkpoint of a 16-bit run: native-fp32 parameters stay rounded",
            upstream="none",
            needed=not probes.float16_saves_native_masters(),
        ),
        float16.native_masters,
    )
