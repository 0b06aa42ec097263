"""Dtype and shape of a tensor, as a checkpoint's header states them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _NAMES.items() if hasattr(torch, attribute)
}
"""safetensors' names for dtypes (safetensors/torch.py)."""

DTYPE_NAMES: dict[torch.dtype, str] = {
    **{dtype: str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    **{dtype: name for name, dtype in DTYPES.items()},
}
"""The name of every dtype of torch: safetensors' name, or torch's name if safetensors has none."""

FLOAT4 = DTYPES.get("F4")
"""A dtype with two values in each element of a tensor. None if this torch does not have it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Counted in values. A float4 tensor of torch has half as many elements on the last axis; see `torch_shape`."""

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of the torch tensor that holds the values."""
        if self.dtype != FLOAT4:
            return self.shape
        assert self.shape
        assert self.shape[-1] % 2 == 0
        return (*self.shape[:-1], self.shape[-1] // 2)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.torch_shape) * self.dtype.itemsize


def info_of(dtype: torch.dtype, torch_shape: Sequence[int]) -> TensorInfo:
    """The `TensorInfo` of a torch tensor of this dtype and shape."""
    shape = tuple(torch_shape)
    return TensorInfo(dtype=dtype, shape=(*shape[:-1], 2 * shape[-1]) if dtype == FLOAT4 and shape else shape)


def empty_tensor(torch_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous, uninitialised tensor. `torch.empty` refuses some dtypes under deterministic algorithms."""
    shape = tuple(torch_shape)
    return torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8).view(dtype).view(shape)


def is_possible_shape(shape: object, dtype: torch.dtype) -> bool:
    """Whether `shape` is a tuple or list of sizes that a tensor can have: strides in bytes fit into signed 64 bits."""
    if not isinstance(shape, tuple | list) or len(shape) > 64:
        return False
    # bool is an int.
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        return False
    return math.prod(max(size, 1) for size in shape) * dtype.itemsize < 2**63
