"""Reads one safetensors file, strictly and without mmap.

The format (github.com/huggingface/safetensors, README.md, "Format"):

- Eight bytes with the length of the header, little-endian.
- The header, a JSON object with dtype, shape and byte range of each tensor.
- The data. The byte ranges cover it up to the end of the file, without holes or overlaps.

There are no checksums. Deviations that the safetensors library accepts are accepted here, too: white space around the
JSON object, a `__metadata__` of null, and unknown fields of a tensor.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.checkpoint.formats.json_file import parse_json
from megatron_fp32.checkpoint.formats.section import read_into
from megatron_fp32.errors import CheckpointError, summary
from megatron_fp32.weights.tensors import DTYPES, FLOAT4, TensorInfo, empty_tensor, is_possible_shape

HEADER_LIMIT = 100_000_000
"""Longest header in bytes, as in the safetensors package."""

_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The checked header of a file."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    starts: Mapping[str, int]
    """Position of each tensor's first byte in the file."""
    metadata: Mapping[str, str]
    identity: tuple[int, ...]
    """Identifies the file, because another file may be at the path when a tensor is read."""


def read_header(path: str | Path) -> Header:
    """Read and check the header.

    Raises:
        CheckpointError: when the file violates the format, naming the file and the tensor.
    """
    path = Path(path)
    try:
        with path.open("rb", buffering=0) as file:
            identity = _identity(file.fileno())
            size = identity[-1]
            prefix = bytes(read_into(file, 0, torch.empty(8, dtype=torch.uint8)))
            length = int.from_bytes(prefix, "little")
            if length > HEADER_LIMIT or 8 + length > size:
                raise ValueError(f"its header should have {length} bytes, but the file has {size}")
            content = bytes(read_into(file, 8, torch.empty(length, dtype=torch.uint8)))
        entries = parse_json(content)
        if not isinstance(entries, dict):
            raise ValueError("its header is not a JSON object")
        metadata = _metadata(entries.pop("__metadata__", None))
        ranges, tensors = _tensors(entries)
        _check_ranges(ranges, size - 8 - length)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {summary(error)}") from error
    starts = {name: 8 + length + start for name, (start, _) in ranges.items()}
    return Header(path=path, tensors=tensors, starts=starts, metadata=metadata, identity=identity)


def read_tensor(header: Header, name: str, index: tuple[int, ...] = ()) -> Tensor:
    """Read a tensor, or only `tensor[index]`. The caller may change the result.

    Args:
        header: the header of the file.
        name: name of the tensor.
        index: positions on the first axes, not negative.

    Raises:
        CheckpointError: when the file has changed since its header was read, or cannot be read.
        IndexError: when the tensor does not have this index.
    """
    info = header.tensors[name]
    part = flat_index(index, info.torch_shape)
    tensor = empty_tensor(info.torch_shape[len(index) :], info.dtype)
    try:
        with header.path.open("rb", buffering=0) as file:
            if _identity(file.fileno()) != header.identity:
                raise ValueError("the file has changed since its header was read")
            read_into(file, header.starts[name] + part * tensor.nbytes, tensor)
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{header.path}: tensor {name!r} cannot be read: {summary(error)}") from error
    return tensor


def flat_index(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The number of the element `tensor[index]` in row-major order.

    Raises:
        IndexError: when the tensor does not have this index.
    """
    if len(index) > len(shape) or not all(0 <= at < size for at, size in zip(index, shape, strict=False)):
        raise IndexError(f"a tensor of shape {shape} does not have the index {index}")
    part = 0
    for at, size in zip(index, shape, strict=False):
        part = part * size + at
    return part


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its __metadata__ must be an object whose values are text")
    return value


def _tensors(entries: dict[str, Any]) -> tuple[dict[str, tuple[int, int]], dict[str, TensorInfo]]:
    """Range of bytes, dtype and shape of every tensor."""
    ranges: dict[str, tuple[int, int]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        name.encode()  # JSON can spell halves of surrogate pairs
        if not isinstance(entry, dict) or not entry.keys() >= _FIELDS:
            raise ValueError(f"tensor {name!r} must be described by dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str):
            raise ValueError(f"the dtype of tensor {name!r} is not a text")
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"tensor {name!r} has the dtype {entry['dtype'][:40]}, which torch does not have")
        dtype, offsets = DTYPES[entry["dtype"]], entry["data_offsets"]
        if not isinstance(entry["shape"], list) or not is_possible_shape(entry["shape"], dtype):
            raise ValueError(f"tensor {name!r} cannot have the shape {str(entry['shape'])[:200]}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
            raise ValueError(f"the data_offsets of tensor {name!r} are not two integers")
        if dtype == FLOAT4 and (not entry["shape"] or entry["shape"][-1] % 2):
            raise ValueError(f"tensor {name!r} of F4 has an odd last axis, which torch cannot hold: {entry['shape']}")
        info = TensorInfo(dtype=dtype, shape=tuple(entry["shape"]))
        start, end = offsets
        if not 0 <= start <= end or end - start != info.nbytes:
            raise ValueError(
                f"tensor {name!r} needs {info.nbytes} bytes, but its data_offsets are {str(offsets)[:200]}"
            )
        ranges[name], tensors[name] = (start, end), info
    return ranges, tensors


def _check_ranges(ranges: Mapping[str, tuple[int, int]], size: int) -> None:
    """Raise ValueError unless the ranges cover `size` bytes, each byte once."""
    covered = 0
    for name, (start, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if start != covered:
            what = "overlaps the tensor before it" if start < covered else "leaves a hole before it"
            raise ValueError(f"tensor {name!r} starts at byte {start} of the data and {what}, which ends at {covered}")
        covered = end
    if covered != size:
        raise ValueError(f"its tensors take {covered} bytes, but the file has {size} bytes of data")
