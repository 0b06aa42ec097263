"""Writes Hugging Face checkpoints, one tensor, or one element of a stack of tensors, at a time.

The header of a safetensors file comes before its data. So all names, dtypes and shapes are declared first, and then the
values may be written in any order. Files are independent, so that each process can write its own files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_fp32.checkpoint.formats.digests import digest_of_blocks
from megatron_fp32.checkpoint.formats.huggingface import INDEX, tensor_bytes
from megatron_fp32.checkpoint.formats.safetensors_file import flat_index, read_header
from megatron_fp32.checkpoint.formats.section import Section, to_disk
from megatron_fp32.errors import CheckpointError, summary
from megatron_fp32.weights.choices import SHARD_BYTES
from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, TensorInfo


class SafetensorsFile:
    """One safetensors file. The constructor writes the header.

    Args:
        path: path of the file to make.
        tensors: the tensors of the file. Wider dtypes come first in the file, as in safetensors' writer, because the
            format does not allow gaps, and every tensor must start at a multiple of its item size.
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._path = Path(path)
        self._infos = {name: tensors[name] for name in by_alignment(tensors)}
        self._written: dict[str, set[tuple[int, ...]]] = {name: set() for name in tensors}
        self._starts = self._declare()

    def write(self, name: str, tensor: Tensor, *, index: tuple[int, ...] = ()) -> None:
        """Write one declared tensor, or `tensor[index]` of one.

        Raises:
            ValueError: when the tensor was not declared with this dtype and shape, or was written already.
        """
        if name not in self._written or self._written[name] & {index, ()}:
            raise ValueError(f"tensor {name!r} was not declared, or is written already")
        info = self._infos[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.torch_shape[len(index) :]:
            raise ValueError(
                f"tensor {name!r} was declared {info.dtype} {info.torch_shape}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}" + (f" for {list(index)}" if index else "")
            )
        try:
            place = self._place(name, index)
        except IndexError as error:
            raise ValueError(f"tensor {name!r} was declared {info.shape}, got the index {list(index)}") from error
        with self._path.open("r+b") as file:
            file.seek(place)
            file.write(tensor_bytes(tensor))
        self._written[name].add(index)

    def digest(self, name: str, index: tuple[int, ...] = ()) -> str:
        """`digest` of a tensor, or of `tensor[index]`, read from the file.

        Raises:
            CheckpointError: when the file ends before the tensor does.
        """
        info, shape = self._infos[name], self._infos[name].torch_shape[len(index) :]
        nbytes = math.prod(shape) * info.dtype.itemsize
        try:
            with self._path.open("rb", buffering=0) as file:
                blocks = Section(file, self._place(name, index), nbytes).blocks(0, nbytes)
                return digest_of_blocks(info.dtype, shape, blocks)
        except EOFError as error:
            raise CheckpointError(f"{self._path}: {name!r} cannot be read back: {summary(error)}") from error

    def finish(self, *, durable: bool = False) -> None:
        """Check that every declared tensor was written, and that the header on the disk is right.

        Args:
            durable: first write the file to the disk and drop it from the page cache.

        Raises:
            ValueError: naming the tensors that were not written.
            CheckpointError: when the header on the disk differs from the written one.
        """
        pending = self.pending()
        if pending:
            raise ValueError(f"tensors declared but not written: {pending}")
        if durable:
            to_disk(self._path)
        header = read_header(self._path)
        if header.tensors != self._infos or header.starts != self._starts:
            raise CheckpointError(
                f"{self._path} has another header on the disk than was written; the disk may be damaged"
            )

    def _place(self, name: str, index: tuple[int, ...]) -> int:
        """Position in the file of `tensor[index]`."""
        info = self._infos[name]
        part = math.prod(info.torch_shape[len(index) :]) * info.dtype.itemsize
        return self._starts[name] + flat_index(index, info.torch_shape) * part

    def pending(self) -> list[str]:
        """Names of the tensors that are not written, or only partly."""
        return sorted(name for name, parts in self._written.items() if not self._is_whole(name, parts))

    def _is_whole(self, name: str, parts: set[tuple[int, ...]]) -> bool:
        shape = self._infos[name].torch_shape
        return bool(parts) and sum(math.prod(shape[len(index) :]) for index in parts) == math.prod(shape)

    def _declare(self) -> dict[str, int]:
        unknown = [name for name, info in self._infos.items() if DTYPE_NAMES[info.dtype] not in DTYPES]
        if unknown:
            raise CheckpointError(
                f"{self._path}: safetensors has no dtype for {unknown[0]!r}, which is {self._infos[unknown[0]].dtype}"
            )
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, info in self._infos.items():
            start, end = end, end + info.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data_start = 8 + len(text)
        with self._path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(data_start + end)
        return {name: data_start + header[name]["data_offsets"][0] for name in self._infos}


class HuggingFaceWriter:
    """Writes tensors into safetensors files, and their index.

    Args:
        directory: an existing directory to write into.
        tensors: dtype and shape of every tensor that will be written.
        max_shard_bytes: most bytes of tensors in a file, unless one tensor is larger.
    """

    def __init__(
        self, directory: str | Path, tensors: Mapping[str, TensorInfo], *, max_shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._directory = Path(directory)
        shards = cut_into_shards([[name] for name in by_alignment(tensors)], tensors, max_shard_bytes)
        names = shard_names(len(shards))
        self._files: dict[str, SafetensorsFile] = {}
        for file, shard in zip(names, shards, strict=True):
            opened = SafetensorsFile(self._directory / file, {name: tensors[name] for name in shard})
            self._files.update(dict.fromkeys(shard, opened))
        write_index(self._directory, dict(zip(names, shards, strict=True)), tensors)

    def write(self, name: str, tensor: Tensor, *, index: tuple[int, ...] = ()) -> None:
        """See `SafetensorsFile.write`."""
        if name not in self._files:
            raise ValueError(f"tensor {name!r} was not declared, or is written already")
        self._files[name].write(name, tensor, index=index)

    def finish(self) -> None:
        """Check that every declared tensor was written.

        Raises:
            ValueError: naming the tensors that were not written.
        """
        pending = sorted(name for file in set(self._files.values()) for name in file.pending())
        if pending:
            raise ValueError(f"tensors declared but not written: {pending}")


def cut_into_shards(groups: Iterable[Sequence[str]], tensors: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    """The names of the tensors of each file.

    Args:
        groups: groups of names that must be in one file, in order.
        tensors: dtype and shape of the tensors.
        limit: most bytes of tensors in a file. A group with more bytes gets its own file.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(tensors[name].nbytes for name in group)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].extend(group)
        size += nbytes
    return [by_alignment({name: tensors[name] for name in shard}) for shard in shards]


def by_alignment(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names of tensors, wider dtypes first, so that every tensor of a file starts at a multiple of its item size."""
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


def shard_names(count: int) -> list[str]:
    """Names for `count` safetensors files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_index(directory: Path, files: Mapping[str, Iterable[str]], tensors: Mapping[str, TensorInfo]) -> None:
    """Write `model.safetensors.index.json` if there is more than one file.

    Args:
        directory: the directory to write into.
        files: the names of the tensors in each file, by file name.
        tensors: dtype and shape of the tensors.
    """
    if len(files) <= 1:
        return
    weight_map = {name: file for file, names in files.items() for name in names}
    total = sum(tensors[name].nbytes for name in weight_map)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
