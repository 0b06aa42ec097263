"""Whether the installed megatron-core has the faults that `native_fp32` repairs.

Each probe runs a method of megatron-core on two parameters, of 5 (bf16) and 3 (fp32) values. It returns True if the
method does not have the fault.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, param_group_identifier_keys
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch import Tensor, nn

from megatron_fp32.optimizer.distributed import GATHERS


class _CudaTyped(nn.Parameter):
    """A parameter whose `type()` is the string of a parameter on a GPU, because the optimizers dispatch on it."""

    def type(self, *args: Any, **kwargs: Any) -> Any:
        name = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor"}[self.dtype]
        return f"torch.cuda.{name}"


def _build_groups() -> tuple[dict[Any, Any], dict[str, Any], list[list[Tensor]]]:
    half, full = _CudaTyped(torch.zeros(5, dtype=torch.bfloat16)), _CudaTyped(torch.zeros(3))
    dtype = (torch.bfloat16, torch.float32)
    ranges = [{dtype: [{"param_map": {p: {"param": Range(0, p.numel())} for p in (half, full)}}]}]
    group: dict[str, Any] = {"params": [half, full]}
    index_map, group_ranges = DistributedOptimizer._build_optimizer_group_ranges([group], ranges)
    built = DistributedOptimizer._build_model_and_main_param_groups(
        ranges, {p: (0, dtype, 0) for p in (half, full)}, group_ranges, OptimizerConfig(optimizer="adam", lr=0.1)
    )
    return index_map, group, built[3]


def shards_are_leaves() -> bool:
    """Whether the distributed optimizer's shards of fp32 parameters are leaves, not views of the model's parameters."""
    _, _, fp32_shards = _build_groups()
    return all(shard.is_leaf for shards in fp32_shards for shard in shards)


def index_map_follows_groups() -> bool:
    """Whether the distributed optimizer's map from parameters to positions has the order of its groups."""
    # The repair replaces __init__, which this probe does not run.
    if Path(vars(DistributedOptimizer)["__init__"].__code__.co_filename).parent == Path(__file__).parent:
        return True
    index_map, group, _ = _build_groups()
    return all(group["params"][order].numel() == param.numel() for param, (_, order) in index_map.items())


def _float16_state_dict() -> Any:
    """The state dict of Float16Optimizer for two groups: a 16-bit and a native-fp32 parameter; and no parameters."""
    half, full = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(3))
    main = torch.zeros(5)
    probe = object.__new__(Float16OptimizerWithFloat16Params)
    inner = torch.optim.SGD([full, main], lr=0.1, momentum=0.9)
    inner.param_groups.append({**inner.param_groups[0], "params": []})
    probe.__dict__.update(
        optimizer=inner,
        float16_groups=[[half], []],
        fp32_from_float16_groups=[[main], []],
        fp32_from_fp32_groups=[[full], []],
        grad_scaler=None,
        is_stub_optimizer=False,
    )
    for param in (full, main):
        inner.state[param] = {"momentum_buffer": torch.zeros_like(param)}
    model = {name: ShardedTensor.from_rank_offsets(name, p) for name, p in (("half", half), ("full", full))}
    try:
        return probe.sharded_state_dict(model)
    except (AssertionError, KeyError, CheckpointingException):
        return None


def float16_ids_count_fp32() -> bool:
    """Whether Float16Optimizer also counts fp32 parameters when it names states for a checkpoint."""
    state_dict = _float16_state_dict()
    return state_dict is not None and bool(state_dict["optimizer"]["state"][0]["momentum_buffer"].key.endswith(".full"))


def float16_groups_may_be_empty() -> bool:
    """Whether a group without main parameters leaves the main parameters of other groups in place in a checkpoint."""
    state_dict = _float16_state_dict()
    if state_dict is None:
        return False
    _, others = extract_matching_values(state_dict, lambda value: isinstance(value, (ShardedTensor, Tensor)))
    return not any(key.startswith("fp32_from_fp16") for key in others)


def float16_saves_native_masters() -> bool:
    """Whether Float16Optimizer stores native-fp32 parameters among the main parameters."""
    state_dict = _float16_state_dict()
    keys = {getattr(value, "key", "") for value in nested_values(state_dict or {})}
    return "optimizer.state.fp32_param.full" in keys


def bucket_padding_is_left_out() -> bool:
    """Whether the distributed optimizer saves the right values for `fully_reshardable` with padding between buckets."""
    first, second = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3))
    dtype = (torch.float32, torch.float32)
    buffer = SimpleNamespace(
        param_index_map={first: (0, 5, 0), second: (6, 9, 1)},
        buckets=[SimpleNamespace(offset=0, numel_unpadded=5), SimpleNamespace(offset=6, numel_unpadded=4)],
        numel_unpadded=9,
    )
    probe = object.__new__(DistributedOptimizer)
    state = {0: {dtype: {"param": torch.arange(9.0), "numel_unpadded": 9}}}
    vars(probe).update(
        buffers=[buffer],
        gbuf_ranges=[{dtype: []}],
        get_parameter_state_dp_zero=lambda **_: state,
        is_stub_optimizer=False,
    )
    model = {name: ShardedTensor.from_rank_offsets(name, p) for name, p in (("first", first), ("second", second))}
    named = probe.sharded_param_state_fully_reshardable(model, metadata={})
    return bool(named[1]["param"].data[0] == 5.0)


def parts_may_be_padding() -> bool:
    """Whether the distributed optimizer can save a bucket for `dp_reshardable` if this rank's shard is only padding."""
    dtype = (torch.float32, torch.float32)
    grads = torch.zeros(64)
    bucket = SimpleNamespace(numel_unpadded=40, grad_data=grads)
    probe = object.__new__(DistributedOptimizer)
    vars(probe).update(
        buffers=[SimpleNamespace(buckets=[bucket], grad_data=grads)],
        gbuf_ranges=[{dtype: [{"param_map": {}}]}],
        data_parallel_group=SimpleNamespace(rank=lambda: 1, size=lambda: 2),
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
        per_bucket_numel=[],
        per_bucket_numel_unpadded=[],
        is_stub_optimizer=False,
        optimizer=SimpleNamespace(state={}),
        config=SimpleNamespace(optimizer="adam"),
    )
    try:
        probe.sharded_param_state_dp_reshardable({})
    except AssertionError:
        return False
    return True


def load_gathers_parameters() -> bool:
    """Whether the distributed optimizer sends loaded native-fp32 parameters to all ranks. No release does."""
    return hasattr(vars(DistributedOptimizer)["load_state_dict"], GATHERS)


def _probe_with_adam(steps: int) -> Any:
    """A DistributedOptimizer that only has torch's Adam for two parameters, after `steps` steps."""
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(5))]
    adam = torch.optim.AdamW(params, lr=0.1)
    for key in param_group_identifier_keys:
        adam.param_groups[0].setdefault(key, None)
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        adam.step()
    probe = object.__new__(DistributedOptimizer)
    probe.__dict__.update(
        optimizer=adam,
        grad_scaler=None,
        ddp_config=SimpleNamespace(use_megatron_fsdp=False),
        config=SimpleNamespace(fp16=False, use_precision_aware_optimizer_no_fp8_or_ds_fp8=False, optimizer="adam"),
        model_param_group_index_map={param: (0, order) for order, param in enumerate(params)},
        is_stub_optimizer=False,
    )
    return probe


def state_dict_works_before_first_step() -> bool:
    """Whether the distributed optimizer's `state_dict` works before the first step of torch's Adam."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return True
    try:
        _probe_with_adam(steps=0).state_dict()
    except AssertionError:
        return False
    return True


def accepts_states_without_step() -> bool:
    """Whether the distributed optimizer loads states of torch's Adam from a format that does not store `step`."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return True
    probe = _probe_with_adam(steps=1)
    param = probe.optimizer.param_groups[0]["params"][0]
    states = {"param": torch.zeros(3), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    try:
        with torch.no_grad():
            probe._set_main_param_and_optimizer_states(param, states)
    except KeyError:
        return False
    return True


def loaded_steps_are_separate() -> bool:
    """Whether each parameter has its own step tensor in torch's Adam after a load."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return True
    probe = _probe_with_adam(steps=1)
    probe.load_state_dict(probe.state_dict())
    steps = [state["step"] for state in probe.optimizer.state.values()]
    return len({step.data_ptr() for step in steps}) == len(steps)
