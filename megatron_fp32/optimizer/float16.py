"""Repairs of `Float16OptimizerWithFloat16Params`. Each is a context manager that replaces one or two methods."""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from megatron_fp32.checkpoint.formats.torch_dist_metadata import read_metadata
from megatron_fp32.optimizer.replaced import replaced


def id_map() -> contextlib.AbstractContextManager[None]:
    """Name states by the numbers of the inner optimizer, which also counts native-fp32 parameters."""

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
            # The original method numbers the parameters in float16_groups. Its numbers are right when float16_groups
            # has every parameter of the inner optimizer, in the inner optimizer's order.
            self.float16_groups = [[model_of.get(id(p), p) for p in group] for group in groups]
            self.fp32_from_float16_groups = groups
            try:
                state_dict = original(self, *args, **kwargs)
            finally:
                self.float16_groups, self.fp32_from_float16_groups = stock
            # A native-fp32 parameter is its own main parameter; `native_masters` saves and loads it.
            state_dict["fp32_from_fp16_params"] = [
                [entry for entry, p in zip(entries, group, strict=True) if id(p) in model_of]
                for entries, group in zip(state_dict["fp32_from_fp16_params"], groups, strict=True)
            ]
            return state_dict

        return repaired

    return replaced(Float16OptimizerWithFloat16Params, "sharded_state_dict", make)


MAIN_PARAMETERS = "fp32_from_fp16_params"
BY_GROUP = "fp32_from_fp16_params_by_group"


def groups_by_number() -> contextlib.AbstractContextManager[None]:
    """Save main parameters in a dict with group numbers as keys, instead of a list with one entry for each group.

    `dist_checkpointing` splits lists into sharded and other entries, and drops empty ones
    (dist_checkpointing/dict_utils.py, `extract_matching_values`), so that an empty group shifts the following groups.
    The dict has its own key, because a checkpoint that was saved without this repair has an unusable list under the old
    key. The tensors in the files have equal names in both forms.
    """

    def make_sharded(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
            state_dict = original(self, *args, **kwargs)
            groups = state_dict.pop(MAIN_PARAMETERS)
            state_dict[BY_GROUP] = {number: entries for number, entries in enumerate(groups) if entries}
            return state_dict

        return repaired

    def make_load(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, state_dict: Any) -> None:
            if BY_GROUP in state_dict:
                mains = self.fp32_from_float16_groups
                groups = [state_dict[BY_GROUP].get(number, []) for number in range(len(mains))]
                state_dict = {**state_dict, MAIN_PARAMETERS: groups}
                for number, (loaded, expected) in enumerate(zip(groups, mains, strict=True)):
                    if len(loaded) != len(expected):
                        raise ValueError(
                            f"the checkpoint has {len(loaded)} main parameters for parameter group {number}, which has "
                            f"{len(expected)} 16-bit parameters on this rank"
                        )
            original(self, state_dict)

        return repaired

    return _replaced_both(make_sharded, make_load)


NATIVE_MASTERS = "fp32_params_by_number"
_MAY_BE_ABSENT = "may_be_absent"


@contextlib.contextmanager
def native_masters() -> Iterator[None]:
    """Save native-fp32 parameters as main parameters, too, and load them from a checkpoint's main parameters.

    In a checkpoint of a run in which these parameters had 16 bits, `optimizer.state.fp32_param.*` is more precise than
    the model's tensors. Such a run also needs `optimizer.state.fp32_param.*` of every parameter when it loads. A
    checkpoint that was saved without this repair does not have them for native-fp32 parameters. It is loaded without
    them, because its model tensors are fp32.
    """

    def make_sharded(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
            state_dict = original(self, model, is_loading, *args, **kwargs)
            native = list(itertools.chain.from_iterable(self.fp32_from_fp32_groups))
            if native:
                entries = get_param_id_to_sharded_param_map(model, native)
                state_dict[NATIVE_MASTERS] = {
                    number: _native_master(entries[number], param, is_loading) for number, param in enumerate(native)
                }
            return state_dict

        return repaired

    def make_load(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, state_dict: Any) -> None:
            original(self, state_dict)
            native = list(itertools.chain.from_iterable(self.fp32_from_fp32_groups))
            for number, master in state_dict.get(NATIVE_MASTERS, {}).items():
                native[number].data.copy_(master)

        return repaired

    with (
        _replaced_both(make_sharded, make_load),
        replaced(TorchDistLoadShardedStrategy, "load", _make_strategy_load),
        replaced(FullyParallelLoadStrategyWrapper, "load", _make_strategy_load),
    ):
        yield


def _native_master(entry: Any, param: Tensor, is_loading: bool) -> Any:
    # Loading writes into this tensor. It must not be the parameter, because the model's state dict is loaded later.
    data = torch.empty_like(param) if is_loading else param.detach()
    master = make_sharded_optimizer_tensor(entry, data, prefix="optimizer.state.fp32_param")
    if is_loading and isinstance(master, ShardedTensor):
        setattr(master, _MAY_BE_ABSENT, True)
    return master


def _make_strategy_load(original: Any) -> Any:
    @functools.wraps(original)
    def repaired(self: Any, sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        file = Path(checkpoint_dir) / ".metadata"
        asked = any(getattr(value, _MAY_BE_ABSENT, False) for value in nested_values(sharded_state_dict))
        if asked and file.is_file():  # a store that is not a file system is left to the original method
            _drop_absent(sharded_state_dict, read_metadata(file).state_dict_metadata)
        return original(self, sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return repaired


def _drop_absent(state: Any, names: Any) -> None:
    """Remove entries from nested dicts that may be absent from the checkpoint and are absent."""
    for key, value in list(state.items()):
        if isinstance(value, dict):
            _drop_absent(value, names)
            if not value:  # the original method fails for empty dicts, because it does not return them
                del state[key]
        elif getattr(value, _MAY_BE_ABSENT, False) and value.key not in names:
            del state[key]


@contextlib.contextmanager
def _replaced_both(make_sharded: Any, make_load: Any) -> Iterator[None]:
    owner = Float16OptimizerWithFloat16Params
    with replaced(owner, "sharded_state_dict", make_sharded), replaced(owner, "load_state_dict", make_load):
        yield
