"""Writes megatron-core's `torch_dist` checkpoints, without a model, a GPU or a process group.

Data files are independent, so that each process can write its own files. `.metadata`, which is written last, lists the
content of all data files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from megatron_fp32.checkpoint.formats.digests import digest_of_blocks
from megatron_fp32.checkpoint.formats.section import to_disk
from megatron_fp32.checkpoint.formats.torch_dist import covers
from megatron_fp32.checkpoint.formats.torch_file import open_torch_file
from megatron_fp32.weights.tensors import DTYPE_NAMES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a tensor and its place in a data file. With `dtype` None, an object that is not a tensor."""

    name: str
    dtype: torch.dtype | None
    size: tuple[int, ...] = ()
    """Shape of the whole tensor."""
    offsets: tuple[int, ...] = ()
    """Where the box begins in the whole tensor."""
    sizes: tuple[int, ...] = ()
    """Shape of the box."""
    start: int
    length: int
    stack_axes: int = 0
    """Number of leading axes of the box that belong to a stack."""

    def to_json(self) -> dict[str, Any]:
        """The chunk as JSON, for another process."""
        return {**dataclasses.asdict(self), "dtype": None if self.dtype is None else DTYPE_NAMES[self.dtype]}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Chunk:
        """The chunk that `to_json` was called on."""
        shapes = {field: tuple(content[field]) for field in ("size", "offsets", "sizes")}
        dtype = None if content["dtype"] is None else _DTYPES[content["dtype"]]
        return Chunk(**{**content, **shapes, "dtype": dtype})


class DataFile:
    """One `.distcp` file: blobs of `torch.save`, one after another.

    Args:
        path: path of the file to make.
        checksums: True follows torch's own setting. False leaves checksums out, which saves half of the time.
    """

    def __init__(self, path: str | Path, *, checksums: bool = True) -> None:
        self._path, self._checksums = Path(path), checksums
        self._stream = self._path.open("xb")
        self.chunks: list[Chunk] = []

    def write(self, name: str, tensor: Tensor, *, index: tuple[int, ...] = (), stack: tuple[int, ...] = ()) -> None:
        """Write a whole tensor, or element `index` of a stack, as one chunk.

        Args:
            name: name of the whole tensor.
            tensor: the values.
            index: which element of the stack `tensor` is; () for a whole tensor.
            stack: sizes of the stack's axes, one for each number in `index`. They are the first axes of the
                checkpoint's tensor.
        """
        sizes = (*([1] * len(index)), *tensor.shape)
        start, length = self._append(_alone(tensor).reshape(sizes))
        self.chunks.append(
            Chunk(
                name=name, dtype=tensor.dtype, size=(*stack, *tensor.shape), offsets=(*index, *([0] * tensor.dim())),
                sizes=sizes, start=start, length=length, stack_axes=len(index),
            )
        )  # fmt: skip

    def write_object(self, name: str, value: Any) -> None:
        """Write an object that is not a tensor, as a list of one object, which megatron-core expects."""
        start, length = self._append([value])
        self.chunks.append(Chunk(name=name, dtype=None, start=start, length=length))

    def close(self, *, durable: bool = False) -> None:
        """Close the file. With `durable`, write it to the disk and drop it from the page cache."""
        self._stream.close()
        if durable:
            to_disk(self._path)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def _append(self, value: Any) -> tuple[int, int]:
        start = self._stream.tell()
        try:
            with contextlib.nullcontext() if self._checksums else _without_crc():
                torch.save(value, self._stream)
            # So that the chunk can be read back at once.
            self._stream.flush()
        except RuntimeError as error:
            # torch's zip writer turns an OSError of the stream into a RuntimeError.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        return start, self._stream.tell() - start


def write_metadata(directory: Path, files: Iterable[tuple[str, Iterable[Chunk]]], common: dict[str, Any]) -> None:
    """Write `.metadata`, `common.pt` and `metadata.json`, which turn data files into a checkpoint.

    Args:
        directory: the directory of the data files.
        files: (name, chunks) of every data file. One of them must have the object `common_state/shard_0_1`.
        common: the common state, such as `args`, `checkpoint_version` and `iteration`.

    Raises:
        ValueError: when chunks of a tensor are missing, were written twice, or disagree.
    """
    entries: dict[str, Any] = {}
    storage: dict[metadata.MetadataIndex, Any] = {}
    for file, chunks in files:
        for chunk in chunks:
            where = filesystem._StorageInfo(file, chunk.start, chunk.length)
            if chunk.dtype is None:
                entries[chunk.name] = metadata.BytesStorageMetadata()
                storage[metadata.MetadataIndex(chunk.name)] = where
                continue
            size, offsets = torch.Size(chunk.size), torch.Size(chunk.offsets)
            properties = metadata.TensorProperties(dtype=chunk.dtype)
            entry = entries.setdefault(chunk.name, metadata.TensorStorageMetadata(properties, size, []))
            if (entry.size, entry.properties.dtype) != (size, chunk.dtype):
                raise ValueError(
                    f"{chunk.name!r} is {entry.properties.dtype} {tuple(entry.size)}, got {chunk.dtype} {chunk.size}"
                )
            entry.chunks.append(metadata.ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk.sizes)))
            storage[metadata.MetadataIndex(chunk.name, offsets)] = where
    tensors = {n: e for n, e in entries.items() if isinstance(e, metadata.TensorStorageMetadata)}
    wrong = sorted(name for name, entry in tensors.items() if not covers(entry))
    if wrong:
        raise ValueError(f"elements of these stacks were not written, or were written twice: {wrong}")
    buffer = io.BytesIO()
    torch.save(common, buffer)
    (directory / "common.pt").write_bytes(buffer.getvalue())
    complete = metadata.Metadata(
        state_dict_metadata=entries, planner_data=None, storage_data=storage, storage_meta=metadata.StorageMeta()
    )
    (directory / ".metadata").write_bytes(pickle.dumps(complete))
    declared = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (directory / "metadata.json").write_text(json.dumps(declared))


def digest_of_chunk(path: Path, chunk: Chunk) -> str:
    """`digest` of a chunk in a data file. The axes of a stack are removed first."""
    with open_torch_file(path, f"the data of {chunk.name!r}", chunk.start, chunk.length) as blob:
        stored = blob.tensor()
        return digest_of_blocks(stored.dtype, stored.shape[chunk.stack_axes :], blob.blocks(stored))


class TorchDistWriter:
    """Writes a `torch_dist` checkpoint with one data file, one tensor or element of a stack at a time.

    Args:
        directory: an existing, empty directory. It is a checkpoint once `finish` has returned.
    """

    FILE = "__0_0.distcp"

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._file = DataFile(self._directory / self.FILE)

    def write(self, name: str, tensor: Tensor, *, index: tuple[int, ...] = (), stack: tuple[int, ...] = ()) -> None:
        """See `DataFile.write`."""
        self._file.write(name, tensor, index=index, stack=stack)

    def write_object(self, name: str, value: Any) -> None:
        """See `DataFile.write_object`."""
        self._file.write_object(name, value)

    def finish(self, common: dict[str, Any]) -> None:
        """Write the common state and the metadata, which complete the checkpoint.

        Args:
            common: see `write_metadata`.

        Raises:
            ValueError: see `write_metadata`.
        """
        self._file.write_object(COMMON_STATE, common)
        self._file.close()
        write_metadata(self._directory, [(self.FILE, self._file.chunks)], common)

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


COMMON_STATE = "common_state/shard_0_1"
"""The object in which megatron-core 0.19 and newer store the common state, instead of in `common.pt`."""


def common_state(args: Namespace) -> dict[str, Any]:
    """The common state of an imported checkpoint, from which a run starts at step 0."""
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and in its own storage, because `torch.save` writes whole storages."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """Turn off the checksums of torch's zip files in the block. They double the time, and torch does not read them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
