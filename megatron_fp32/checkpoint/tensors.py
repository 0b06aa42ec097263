"""What both kinds of checkpoint say of a tensor, and the error that their readers raise."""

from __future__ import annotations

import dataclasses
import math

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names for dtypes."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint is not what it should be. The message names the file and the tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_possible_shape(shape: object, dtype: torch.dtype) -> bool:
    """A tuple or list of sizes that a tensor can have: its strides in bytes fit into 64 bits with a sign."""
    if not isinstance(shape, tuple | list) or len(shape) > 64:
        return False
    # bool is an int.
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        return False
    return math.prod(max(size, 1) for size in shape) * dtype.itemsize < 2**63


def summary(error: BaseException, limit: int = 200) -> str:
    """An error in a few words: a damaged file may put itself into the message."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."
