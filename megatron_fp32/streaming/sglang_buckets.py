"""Buckets in SGLang's own format, and the pickle that hands one of them to an engine on the same GPU.

SGLang's `FlattenedTensorBucket` is uint8: tensors one after the other, without padding. It reads a tensor as a view of
its dtype, so that a tensor at an offset that its dtype does not divide cannot be read.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import pickle
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_fp32.transfer.buckets import Place
from megatron_fp32.weights.tensors import TensorInfo

_DEVICE = 6
"""Place of the device among the arguments of torch's `rebuild_cuda_tensor`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatBucket:
    """Tensors that travel in one buffer, in the order in which SGLang loads them."""

    places: tuple[Place, ...]
    nbytes: int

    @property
    def names(self) -> list[str]:
        """As SGLang's request has them."""
        return [place.name for place in self.places]

    @property
    def dtypes(self) -> list[str]:
        """Names in torch, as SGLang's request has them."""
        return [str(place.info.dtype).removeprefix("torch.") for place in self.places]

    @property
    def shapes(self) -> list[list[int]]:
        """As SGLang's request has them."""
        return [list(place.info.torch_shape) for place in self.places]


def plan_flat_buckets(tensors: Mapping[str, TensorInfo], bucket_bytes: int) -> list[FlatBucket]:
    """Distribute tensors over buckets, in their order.

    A bucket is closed before it grows past `bucket_bytes`. A tensor that is larger gets a bucket of its own. Inside a
    bucket, tensors keep their order where each is aligned in it. Else wider dtypes go first, which aligns all of them,
    because the size of a tensor is a multiple of its dtype's size and those sizes are powers of two. SGLang's loaders
    take any order: the files of a checkpoint have none.
    """
    buckets: list[FlatBucket] = []
    group: list[tuple[str, TensorInfo]] = []
    size = 0
    for name, info in tensors.items():
        if group and size + info.nbytes > bucket_bytes:
            buckets.append(_bucket(group))
            group, size = [], 0
        group.append((name, info))
        size += info.nbytes
    return [*buckets, _bucket(group)] if group else buckets


def _bucket(group: list[tuple[str, TensorInfo]]) -> FlatBucket:
    starts = _starts(group)
    if any(start % info.dtype.itemsize for start, (_, info) in zip(starts, group, strict=False)):
        group = sorted(group, key=lambda item: -item[1].dtype.itemsize)
        starts = _starts(group)
    places = (Place(name=name, info=info, start=start) for start, (name, info) in zip(starts, group, strict=False))
    return FlatBucket(places=tuple(places), nbytes=starts[-1])


def _starts(group: list[tuple[str, TensorInfo]]) -> list[int]:
    """Of every tensor, and the end of the last one."""
    return list(itertools.accumulate((info.nbytes for _, info in group), initial=0))


def pickled(bucket: FlatBucket, buffer: Tensor) -> bytes:
    """What SGLang's `MultiprocessingSerializer` reads for the format "flattened_bucket": made anew for every rank.

    It is a dict with the buffer and with name, shape, dtype and place of every tensor. Of the buffer it holds a handle
    of its memory (CUDA IPC, or the name of shared memory), not its bytes. SGLang unpickles it with a list of allowed
    names. Those used here are plain ones of torch and `types.SimpleNamespace`, so that the trainer needs no SGLang.

    Args:
        bucket: what the buffer holds.
        buffer: uint8 [bucket.nbytes].
    """
    metadata = [
        types.SimpleNamespace(
            name=place.name,
            shape=torch.Size(place.info.torch_shape),
            dtype=place.info.dtype,
            start_idx=place.start,
            end_idx=place.start + place.info.nbytes,
            numel=place.info.nbytes,
        )
        for place in bucket.places
    ]
    file = io.BytesIO()
    _Pickler(file, protocol=4).dump({"flattened_tensor": buffer, "metadata": metadata})
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles a tensor as a handle of its memory, and names its GPU by the UUID: indices differ between processes.

    torch's own pickles of CPU tensors name a function that megatron-core replaces, and that SGLang then refuses.
    """

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, torch.storage.TypedStorage):
            return reductions.rebuild_typed_storage, (thing.untyped(), thing.dtype)
        if isinstance(thing, torch.UntypedStorage):
            return _shared(thing)
        if not isinstance(thing, Tensor):
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(thing)  # type: ignore[no-untyped-call]
        if thing.is_cuda and isinstance(arguments[_DEVICE], int):  # SGLang, when it is imported here, has done this
            uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
            arguments = (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
        return rebuild, arguments


def _shared(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """Memory of the host under a name: torch's "file_system" strategy, without choosing it for the whole process."""
    handle = storage._share_filename_cpu_()
    storage._shared_incref()  # type: ignore[no-untyped-call]
    return reductions.rebuild_storage_filename, (type(storage), *handle)
