"""Hugging Face checkpoints, read one tensor at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp32.checkpoint.formats.directory import refuse_no_file, refuse_pointers, why_no_weights
from megatron_fp32.checkpoint.formats.files import read_json
from megatron_fp32.checkpoint.formats.safetensors_file import Header, read_header, read_tensor
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, TensorInfo

__all__ = ["DTYPES", "DTYPE_NAMES", "INDEX", "CheckpointError", "HuggingFaceReader", "TensorInfo"]

INDEX = "model.safetensors.index.json"


class HuggingFaceReader(contextlib.AbstractContextManager["HuggingFaceReader"]):
    """The tensors of a directory of safetensors files, by name.

    Nothing is kept open or mapped into memory: a reader can be used by several threads and sent to other processes.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names.

    Attributes:
        tensors: what the headers say, for every tensor of the checkpoint.

    Raises:
        CheckpointError: when files are missing, damaged, or hold other tensors than the index says.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._headers: dict[str, Header] = {}
        for path, expected in self._files():
            self._open(path, expected)

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """The tensor, or `tensor[index]`, of which nothing else is read. It is the caller's own.

        Raises:
            CheckpointError: when its file has changed, or cannot be read.
        """
        return read_tensor(self._headers[name], name, index)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(sorted({header.path for header in self._headers.values()}))

    def __exit__(self, *exc: object) -> None:
        pass

    def _files(self) -> list[tuple[Path, set[str] | None]]:
        index = self.directory / INDEX
        single = self.directory / "model.safetensors"
        for path in (index, single):
            refuse_no_file(path)
        if index.is_file():
            files = self._indexed_files(index)
            if single.is_file() and single not in [path for path, _ in files]:
                raise CheckpointError(
                    f"{self.directory} holds both model.safetensors and {INDEX}, which does not name it; which of them "
                    "is meant?"
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
            raise CheckpointError(f"{index} names files outside of its directory: {_shown(outside)}")
        return [(self.directory / file, names) for file, names in sorted(files.items())]

    def _open(self, path: Path, expected: set[str] | None) -> None:
        refuse_no_file(path)
        if not os.path.isfile(path):  # unlike Path.is_file, for any text in the index
            raise CheckpointError(
                f"{path} is missing; {self.directory / INDEX} names it. If its download was interrupted, run hf "
                "download again"
            )
        refuse_pointers([path])
        header = read_header(path)
        names = header.tensors.keys()
        if expected is not None and expected - names:
            raise CheckpointError(f"{path} lacks tensors that the index promises: {_shown(expected - names)}")
        for name, info in sorted(header.tensors.items()):
            if name in self.tensors:
                raise CheckpointError(f"tensor {name!r} is in more than one file of {self.directory}")
            self.tensors[name] = info
            self._headers[name] = header
        if expected is not None and names - expected:
            raise CheckpointError(
                f"{path} holds tensors that the index does not place there: {_shown(names - expected)}"
            )


def _shown(names: Collection[str]) -> str:
    """Names for a message: they may be many, and long."""
    return str(sorted(names))[:2000]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values in row-major order, little-endian, as the machine holds them."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
