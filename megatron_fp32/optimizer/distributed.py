"""Repairs of `DistributedOptimizer`. Each is a context manager that replaces one method."""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import contextlib
import functools
import itertools
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_fp32.optimizer.replaced import replaced


def leaf_shards() -> contextlib.AbstractContextManager[None]:
    """Make the shards of native-fp32 parameters leaves of autograd, so that a checkpoint can be loaded into them."""

    def make(original: Any) -> Any:
        build = original.__func__

        @functools.wraps(build)
        def repaired(cls: Any, gbuf_ranges: Any, param_gbuf_map: Any, opt_group_ranges: Any, config: Any) -> Any:
            built = build(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
            for group_range, shards in zip(opt_group_ranges, built[3], strict=True):
                params = group_range["orig_group"]["params"]
                for i, shard in enumerate(shards):
                    # detach(), not no_grad(): autograd forbids changing a view in place that was made under no_grad.
                    leaf = shard.detach()
                    vars(leaf).update(vars(shard))
                    shards[i] = leaf
                    params[next(j for j, p in enumerate(params) if p is shard)] = leaf
            return built

        return classmethod(repaired)

    return replaced(DistributedOptimizer, "_build_model_and_main_param_groups", make)


def index_map() -> contextlib.AbstractContextManager[None]:
    """Give `model_param_group_index_map` the order of the inner optimizer: native-fp32 parameters first."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            # A stub optimizer and Megatron-FSDP do not have these groups.
            groups = zip(getattr(self, "model_fp32_groups", ()), getattr(self, "model_float16_groups", ()), strict=True)
            for group_index, (fp32, float16) in enumerate(groups):
                for order, param in enumerate([*fp32, *float16]):
                    self.model_param_group_index_map[param] = (group_index, order)

        return repaired

    return replaced(DistributedOptimizer, "__init__", make)


def zero_state_before_first_step() -> contextlib.AbstractContextManager[None]:
    """Give torch's Adam states before its first step, because a load needs them."""

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

    return replaced(DistributedOptimizer, "state_dict", make)


def keep_step_when_missing() -> contextlib.AbstractContextManager[None]:
    """Keep the step of torch's Adam when a checkpoint has it only in the parameter groups."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
            group_index, order = self.model_param_group_index_map[model_param]
            main = self.optimizer.param_groups[group_index]["params"][order]
            step = self.optimizer.state[main].get("step")
            if isinstance(step, Tensor) and "step" not in tensors:
                # load_state_dict has set the step from the parameter groups.
                tensors = {**tensors, "step": step.clone()}
            original(self, model_param, tensors)

        return repaired

    return replaced(DistributedOptimizer, "_set_main_param_and_optimizer_states", make)


def separate_steps() -> contextlib.AbstractContextManager[None]:
    """Give each parameter its own step tensor in torch's Adam after a load."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, state_dict: Any) -> None:
            original(self, state_dict)
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    state = self.optimizer.state[param]
                    if "step" in group and isinstance(state.get("step"), Tensor):
                        # The groups have the saved step. dp_reshardable has just overwritten the state's step with
                        # the step from before the load.
                        state["step"] = torch.full_like(state["step"], float(group["step"]))

        return repaired

    return replaced(DistributedOptimizer, "load_state_dict", make)


def _adam_zero_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The states that `torch.optim.Adam` creates at its first step, with their initial values."""
    on_device = group.get("capturable") or group.get("fused")
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu"),
        "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
    }
    if group.get("amsgrad"):
        state["max_exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state


GATHERS = "gathers_fp32_parameters"
"""The attribute of a `load_state_dict` that sends loaded native-fp32 parameters to all ranks."""


def bucket_padding() -> contextlib.AbstractContextManager[None]:
    """Save the right values for `fully_reshardable` with several buckets.

    `get_parameter_state_dp_zero` gathers every state of a buffer without the padding between buckets. But
    `sharded_param_state_fully_reshardable` cuts parameters out of the result at their positions with padding
    (optimizer/distrib_optimizer.py of 0.16.1 to 0.19.2, where a TODO names an internal issue 504).
    """

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
            gather = self.get_parameter_state_dp_zero
            stock = [buffer.param_index_map for buffer in self.buffers]

            def gathered(*gather_args: Any, **gather_kwargs: Any) -> Any:
                state = gather(*gather_args, **gather_kwargs)
                for index, buffer in enumerate(self.buffers if state is not None else ()):
                    (world,) = state[index].values()
                    if len(world["param"]) == sum(bucket.numel_unpadded for bucket in buffer.buckets):
                        buffer.param_index_map = _places_without_padding(buffer)
                return state

            self.get_parameter_state_dp_zero = gathered
            try:
                return original(self, *args, **kwargs)
            finally:
                del self.get_parameter_state_dp_zero
                for buffer, places in zip(self.buffers, stock, strict=True):
                    buffer.param_index_map = places

        return repaired

    return replaced(DistributedOptimizer, "sharded_param_state_fully_reshardable", make)


def _places_without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """(start, end, bucket) of each parameter in a buffer without padding between buckets."""
    unpadded = itertools.accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
    shifts = [bucket.offset - start for bucket, start in zip(buffer.buckets, unpadded, strict=False)]
    return {
        param: (start - shifts[bucket], end - shifts[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }


def shards_without_parameters() -> contextlib.AbstractContextManager[None]:
    """Let `dp_reshardable` save a bucket in which the shard of some rank is only padding.

    Native-fp32 parameters have their own buffers, which are so small that this happens with a few ranks.
    """

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
            get = self.get_parameter_state_dp_reshardable

            def filled() -> Any:
                state = get()
                buckets = [b for i in range(len(self.gbuf_ranges)) for per_type in state[i].values() for b in per_type]
                like = next((bucket[0] for bucket in buckets if bucket), None) or _plain_states(self)
                for bucket in buckets:
                    if not bucket:
                        bucket.append(_padding_of_no_length(like))
                return state

            self.get_parameter_state_dp_reshardable = filled
            try:
                state = original(self, *args, **kwargs)
            finally:
                del self.get_parameter_state_dp_reshardable
            _place_empty_tensors(state, len(self.gbuf_ranges))
            return state

        return repaired

    return replaced(DistributedOptimizer, "sharded_param_state_dp_reshardable", make)


def _plain_states(optimizer: Any) -> dict[str, Tensor]:
    """A main parameter and its states, with one value each."""
    keys = getattr(optimizer, "optimizer_state_keys", ("exp_avg", "exp_avg_sq"))
    return {key: torch.empty(1, device=optimizer.buffers[0].grad_data.device) for key in ("param", *keys)}


def _padding_of_no_length(like: dict[str, Any]) -> dict[str, Any]:
    """An empty entry. megatron-core's method then treats the whole shard as padding."""
    tensors = {key: v.new_empty(0) for key, v in like.items() if isinstance(v, Tensor) and v.dim() == 1}
    return {**tensors, "gbuf_local_start": 0, "gbuf_local_end": 0, "padding": True}


def _place_empty_tensors(state: dict[Any, Any], buffers: int) -> None:
    """Move empty tensors to the end of their whole tensor, because this rank's offset may lie beyond it."""
    for index in range(buffers):
        for buckets in state[index].values():
            for entry in itertools.chain.from_iterable(buckets):
                for tensor in entry.values():
                    if isinstance(tensor, ShardedTensor) and tensor.local_shape == (0,):
                        tensor.global_offset = tensor.global_shape


def fp32_parameters_after_load() -> contextlib.AbstractContextManager[None]:
    """Send loaded main parameters of native-fp32 parameters to all ranks.

    The main parameter of a native-fp32 parameter is this rank's shard of the model's parameter. In a checkpoint of a
    run in which the parameter had 16 bits, the model's tensor is less precise than the main parameter. Without this
    repair, a rank would use the less precise values for the shards of other ranks until the next step.
    """

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def repaired(self: Any, state_dict: Any) -> None:
            original(self, state_dict)
            if "param_state" not in state_dict or self.data_parallel_group.size() == 1:
                return
            for buffer in self.buffers:
                if buffer.param_dtype == torch.float32 and buffer.param_data is not None:
                    for bucket in buffer.buckets:
                        count = bucket.param_data.numel() // self.data_parallel_group.size()
                        own = bucket.param_data[count * self.data_parallel_group.rank() :][:count]
                        torch.distributed.all_gather_into_tensor(
                            bucket.param_data, own.clone(), group=self.data_parallel_group
                        )

        setattr(repaired, GATHERS, True)  # functools.wraps in another repair copies this attribute
        return repaired

    return replaced(DistributedOptimizer, "load_state_dict", make)
