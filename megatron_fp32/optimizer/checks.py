"""Find settings that fail with native-fp32 parameters and that no repair can fix, before they do harm."""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def communication_problems(chunks: Sequence[Any], optimizer: Any) -> Iterator[str]:
    """One sentence for each bucket group that sends two dtypes in one call.

    With `disable_bucketing=True`, which Megatron-LM sets for virtual pipeline chunks after the first,
    DistributedDataParallel puts all buckets of a chunk into one group.

    Args:
        chunks: this rank's model chunks, wrapped in DistributedDataParallel or bare.
        optimizer: None, or megatron-core's optimizer, chained or not. For bare chunks, it gives the wrapped chunks.
    """
    inner = [optimizer, *(getattr(optimizer, "chained_optimizers", None) or [])]
    wrapped = [chunk for one in inner for chunk in getattr(one, "model_chunks", None) or []]
    groups = [group for chunk in (*chunks, *wrapped) for group in _groups_of(chunk)]
    for group in {id(group): group for group in groups}.values():
        gradients = {str(bucket.grad_data.dtype) for bucket in group.buckets}
        parameters = {str(bucket.param_data.dtype) for bucket in group.buckets if bucket.param_data is not None}
        if len(gradients) > 1:
            yield (
                f"gradients of {_listed(gradients)} are reduced in one call: set grad_reduce_in_fp32=True, or "
                "disable_bucketing=False for every chunk"
            )
        elif len(parameters) > 1 and _backend(group) == "gloo":
            yield (
                f"parameters of {_listed(parameters)} are gathered in one call, which gloo does wrongly and without an "
                "error: use NCCL, or disable_bucketing=False for every chunk"
            )


def offload_problems(optimizer: Any) -> Iterator[str]:
    """One sentence if the optimizer has its states on the CPU, because its checkpoints cannot be loaded.

    Args:
        optimizer: an optimizer that is not chained.
    """
    if isinstance(getattr(optimizer, "optimizer", None), HybridDeviceOptimizer):
        yield (
            "the optimizer has its states on the CPU (optimizer_cpu_offload): megatron-core fails to load its "
            "checkpoints, with a KeyError, with or without fp32 parameters; set optimizer_cpu_offload=False"
        )


def _groups_of(chunk: Any) -> list[Any]:
    return [*getattr(chunk, "bucket_groups", ()), *getattr(chunk, "expert_parallel_bucket_groups", ())]


def _backend(group: Any) -> str:
    names = ("intra_distributed_optimizer_instance_group", "data_parallel_group")
    return str(dist.get_backend(next(getattr(group, name) for name in names if hasattr(group, name))))


def _listed(names: set[str]) -> str:
    return " and ".join(sorted(names))
