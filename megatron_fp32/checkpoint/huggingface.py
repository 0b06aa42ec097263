"""Hugging Face checkpoints, read one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
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


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values in row-major order, little-endian, as the machine holds them."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
