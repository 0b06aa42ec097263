"""Hugging Face checkpoints, read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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

INDEX = "model.safetensors.index.json"


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


class HuggingFaceReader(contextlib.AbstractContextManager["HuggingFaceReader"]):
    """The tensors of a directory of safetensors files, by name.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names.

    Attributes:
        tensors: what the headers say, for every tensor of the checkpoint.

    Raises:
        CheckpointError: when files are missing, unreadable, or disagree with the index.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._stack = contextlib.ExitStack()
        self.tensors: dict[str, TensorInfo] = {}
        self._handles: dict[str, Any] = {}
        try:
            for path, expected in self._files():
                self._open(path, expected)
        except BaseException:
            self._stack.close()
            raise

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """The tensor, or `tensor[index]`. It may share memory with another read of the name: do not write to it."""
        if index:
            part: Tensor = self._handles[name].get_slice(name)[index]
            return part
        return self._handles[name].get_tensor(name)

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _files(self) -> list[tuple[Path, set[str] | None]]:
        index = self.directory / INDEX
        single = self.directory / "model.safetensors"
        if index.is_file() and single.is_file():
            raise CheckpointError(f"{self.directory} holds both model.safetensors and {INDEX}; which of them is meant?")
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                files = {str(file): {n for n, f in weight_map.items() if f == file} for file in weight_map.values()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index} is no safetensors index: {error!r}") from error
            outside = [file for file in files if Path(file).name != file]
            if outside:
                raise CheckpointError(f"{index} names files outside of its directory: {sorted(outside)}")
            return [(self.directory / file, names) for file, names in sorted(files.items())]
        if not single.is_file():
            raise CheckpointError(f"{self.directory} holds neither model.safetensors nor {INDEX}")
        return [(single, None)]

    def _open(self, path: Path, expected: set[str] | None) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {self.directory / INDEX} names it")
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
        names = set(handle.keys())
        if expected is not None and not expected <= names:
            raise CheckpointError(f"{path} lacks tensors that the index promises: {sorted(expected - names)}")
        for name in sorted(names):
            if name in self.tensors:
                raise CheckpointError(f"tensor {name!r} is in more than one file of {self.directory}")
            described = handle.get_slice(name)
            stored = described.get_dtype()
            if stored not in DTYPES:
                raise CheckpointError(f"{path}: tensor {name!r} has the unsupported dtype {stored}")
            self.tensors[name] = TensorInfo(dtype=DTYPES[stored], shape=tuple(described.get_shape()))
            self._handles[name] = handle


class HuggingFaceWriter:
    """Writes tensors into safetensors files in the order in which they are declared.

    The header of a safetensors file comes before its data, so all names, dtypes and shapes are given first; the values
    may then arrive in any order, one at a time.

    Args:
        directory: an existing directory to write into.
        tensors: every tensor that will be written.
        max_shard_bytes: a file is closed before it grows past this.
    """

    def __init__(
        self, directory: str | Path, tensors: Mapping[str, TensorInfo], *, max_shard_bytes: int = 5 * 10**9
    ) -> None:
        self._directory = Path(directory)
        self._written: dict[str, set[tuple[int, ...]]] = {name: set() for name in tensors}
        self._places: dict[str, tuple[Path, int, TensorInfo]] = {}
        shards = _shards(tensors, max_shard_bytes)
        names = _shard_names(len(shards))
        for file, shard in zip(names, shards, strict=True):
            self._declare(self._directory / file, {name: tensors[name] for name in shard})
        if len(shards) > 1:
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            total = sum(info.nbytes for info in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor, *, index: tuple[int, ...] = ()) -> None:
        """Write one declared tensor, or `tensor[index]` of one.

        Raises:
            ValueError: when it was not declared so, or was written already.
        """
        if name not in self._written or self._written[name] & {index, ()}:
            raise ValueError(f"tensor {name!r} was not declared, or is written already")
        path, offset, info = self._places[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape[len(index) :]:
            raise ValueError(
                f"tensor {name!r} was declared {info.dtype} {info.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
                + (f" for {list(index)}" if index else "")
            )
        element = 0
        for at, size in zip(index, info.shape, strict=False):
            if not 0 <= at < size:
                raise ValueError(f"tensor {name!r} was declared {info.shape}, got a part at {list(index)}")
            element = element * size + at
        content = tensor_bytes(tensor)
        with path.open("r+b") as file:
            file.seek(offset + element * content.nbytes)
            file.write(content)
        self._written[name].add(index)

    def finish(self) -> None:
        """Check that every declared tensor was written.

        Raises:
            ValueError: naming those that were not.
        """
        pending = sorted(name for name, parts in self._written.items() if not self._is_whole(name, parts))
        if pending:
            raise ValueError(f"tensors declared but not written: {pending}")

    def _is_whole(self, name: str, parts: set[tuple[int, ...]]) -> bool:
        shape = self._places[name][2].shape
        return bool(parts) and sum(math.prod(shape[len(index) :]) for index in parts) == math.prod(shape)

    def _declare(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, info in tensors.items():
            start, end = end, end + info.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data_start = 8 + len(text)
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(data_start + end)
        for name, info in tensors.items():
            self._places[name] = (path, data_start + header[name]["data_offsets"][0], info)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values in row-major order, little-endian, as the machine holds them."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _shards(tensors: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    # Wider dtypes first keeps every tensor of a file aligned to its item size.
    for name in _by_alignment(tensors):
        nbytes = tensors[name].nbytes
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return [_by_alignment({name: tensors[name] for name in shard}) for shard in shards]


def _by_alignment(tensors: Mapping[str, TensorInfo]) -> list[str]:
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


def _shard_names(count: int) -> Iterable[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
