"""Reads Hugging Face checkpoints, one tensor at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp32.checkpoint.formats.directory_checks import refuse_irregular_file, refuse_pointers, why_no_weights
from megatron_fp32.checkpoint.formats.json_file import read_json
from megatron_fp32.checkpoint.formats.safetensors_file import Header, read_header, read_tensor
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, TensorInfo

__all__ = ["DTYPES", "DTYPE_NAMES", "INDEX", "CheckpointError", "HuggingFaceReader", "TensorInfo"]

INDEX = "model.safetensors.index.json"


class HuggingFaceReader(contextlib.AbstractContextManager["HuggingFaceReader"]):
    """Reads the tensors in a directory of safetensors files. It is a `TensorSource`.

    No file stays open or mapped into memory. Several threads may use a reader, and it can be sent to other processes.

    Args:
        directory: a directory with `model.safetensors`, or with `model.safetensors.index.json` and the files in it.

    Attributes:
        tensors: dtype and shape of every tensor of the checkpoint, from the headers.

    Raises:
        CheckpointError: when files are missing or damaged, or do not have the tensors that the index lists.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._headers: dict[str, Header] = {}
        for path, expected in self._files():
            self._open(path, expected)

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read a tensor, or only `tensor[index]`. The caller may change the result.

        Raises:
            CheckpointError: when its file has changed, or cannot be read.
        """
        return read_tensor(self._headers[name], name, index)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files with the tensors."""
        return tuple(sorted({header.path for header in self._headers.values()}))

    def __exit__(self, *exc: object) -> None:
        pass

    def _files(self) -> list[tuple[Path, set[str] | None]]:
        index = self.directory / INDEX
        single = self.directory / "model.safetensors"
        for path in (index, single):
            refuse_irregular_file(path)
        if index.is_file():
            files = self._indexed_files(index)
            if single.is_file() and single not in [path for path, _ in files]:
                raise CheckpointError(
                    f"{self.directory} holds both model.safetensors and {INDEX}, but {INDEX} does not list "
                    "model.safetensors: remove the one that does not belong to the checkpoint"
                )
            return files
        if not single.is_file():
            raise CheckpointError(why_no_weights(self.directory))
        return [(single, None)]

    def _indexed_files(self, index: Path) -> list[tuple[Path, set[str] | None]]:
        refuse_pointers([index])
        content = read_json(index, "safetensors index")
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} is not a safetensors index: it has no weight_map from tensors to files")
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, set()).add(name)
        outside = [f for f in files if f in ("", "..") or Path(f).name != f or len(f) > 255]
        if outside:
            raise CheckpointError(f"{index} lists files outside of its directory: {_shown(outside)}")
        return [(self.directory / file, names) for file, names in sorted(files.items())]

    def _open(self, path: Path, expected: set[str] | None) -> None:
        refuse_irregular_file(path)
        if not os.path.isfile(path):  # unlike Path.is_file, for any text in the index
            raise CheckpointError(
                f"{path} is missing, but {self.directory / INDEX} lists it. If the download was interrupted, run hf "
                "download again"
            )
        refuse_pointers([path])
        header = read_header(path)
        names = header.tensors.keys()
        if expected is not None and expected - names:
            raise CheckpointError(f"{path} does not have tensors that the index lists: {_shown(expected - names)}")
        for name, info in sorted(header.tensors.items()):
            if name in self.tensors:
                raise CheckpointError(f"tensor {name!r} is in more than one file of {self.directory}")
            self.tensors[name] = info
            self._headers[name] = header
        if expected is not None and names - expected:
            raise CheckpointError(f"{path} has tensors that the index does not list for it: {_shown(names - expected)}")


def _shown(names: Collection[str]) -> str:
    """Names for a message, cut after 2000 characters."""
    return str(sorted(names))[:2000]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of the values in row-major order, in the machine's byte order, which is little-endian."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
