"""megatron-core's `torch_dist` checkpoints, written without a model, a GPU or a process group.

Data files are independent of each other: processes may write one each. What they hold is put together in `.metadata`
when all of them are there.
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
from megatron_fp32.checkpoint.formats.files import to_disk
from megatron_fp32.checkpoint.formats.torch_dist import covers
from megatron_fp32.checkpoint.formats.torch_file import open_torch_file
from megatron_fp32.weights.tensors import DTYPE_NAMES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a tensor, and where it lies; or, with `dtype` None, something that is no tensor."""

    name: str
    dtype: torch.dtype | None
    size: tuple[int, ...] = ()
    """Of the whole tensor."""
    offsets: tuple[int, ...] = ()
    """Of the box in it."""
    sizes: tuple[int, ...] = ()
    """Of the box."""
    start: int
    length: int
    stack_axes: int = 0
    """How many of the box's axes, the first ones, say which element of a stack it is."""

    def to_json(self) -> dict[str, Any]:
        """For a record that another process reads."""
        return {**dataclasses.asdict(self), "dtype": None if self.dtype is None else DTYPE_NAMES[self.dtype]}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Chunk:
        """What `to_json` made."""
        shapes = {field: tuple(content[field]) for field in ("size", "offsets", "sizes")}
        dtype = None if content["dtype"] is None else _DTYPES[content["dtype"]]
        return Chunk(**{**content, **shapes, "dtype": dtype})


class DataFile:
    """One `.distcp` file: `torch.save` blobs, one after another.

    Args:
        path: of the file to make.
        checksums: leave them to torch's own setting; without, they are left out, which saves half of the time.
    """

    def __init__(self, path: str | Path, *, checksums: bool = True) -> None:
        self._path, self._checksums = Path(path), checksums
        self._stream = self._path.open("xb")
        self.chunks: list[Chunk] = []

    def write(self, name: str, tensor: Tensor, *, index: tuple[int, ...] = (), stack: tuple[int, ...] = ()) -> None:
        """Write a tensor under its global name, or element `index` of a stack, which becomes a chunk of its own.

        Args:
            name: global name.
            tensor: its values.
            index: which element of the stack it is; empty for a whole tensor.
            stack: sizes of the stack's axes, as many as `index` has; they come first in the checkpoint's tensor.
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
        """Write something that is no tensor. megatron-core expects objects as one-element lists."""
        start, length = self._append([value])
        self.chunks.append(Chunk(name=name, dtype=None, start=start, length=length))

    def close(self, *, durable: bool = False) -> None:
        """`durable`: return when it is on the disk, and no longer in the cache."""
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
            # What was written can be read back from now on.
            self._stream.flush()
        except RuntimeError as error:
            # torch's zip writer has its own words for a stream that could not be written.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        return start, self._stream.tell() - start


def write_metadata(directory: Path, files: Iterable[tuple[str, Iterable[Chunk]]], common: dict[str, Any]) -> None:
    """Make data files a checkpoint: `.metadata`, `common.pt`, `metadata.json`.

    Args:
        directory: where the files are.
        files: names of the data files, and what they hold; `common_state/shard_0_1` among it.
        common: what a trainer reads besides tensors: `args`, `checkpoint_version`, `iteration`.

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
        raise ValueError(f"elements of these stacks are missing, or were written twice: {wrong}")
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
    """`digest` of a chunk of a data file, without the axes of the stack that it is an element of."""
    with open_torch_file(path, f"the data of {chunk.name!r}", chunk.start, chunk.length) as blob:
        stored = blob.tensor()
        return digest_of_blocks(stored.dtype, stored.shape[chunk.stack_axes :], blob.blocks(stored))


class TorchDistWriter:
    """Writes a `torch_dist` checkpoint of one data file, one tensor, or one element of a stack of tensors, at a time.

    Args:
        directory: an existing, empty directory; it becomes a checkpoint when `finish` returns.
    """

    FILE = "__0_0.distcp"

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._file = DataFile(self._directory / self.FILE)

    def write(self, name: str, tensor: Tensor, *, index: tuple[int, ...] = (), stack: tuple[int, ...] = ()) -> None:
        """As `DataFile.write`."""
        self._file.write(name, tensor, index=index, stack=stack)

    def write_object(self, name: str, value: Any) -> None:
        """As `DataFile.write_object`."""
        self._file.write_object(name, value)

    def finish(self, common: dict[str, Any]) -> None:
        """Write the common state and the metadata; the checkpoint is complete after this. Raises as `write_metadata`.

        Args:
            common: see there.
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
"""Where megatron-core 0.19 and newer look for what `common.pt` holds."""


def common_state(args: Namespace) -> dict[str, Any]:
    """The common state of a checkpoint that no trainer has touched yet."""
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, in a storage of its own: `torch.save` would write the rest of a shared one too."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """torch's zip files carry a checksum that takes as long as the rest, and that its own reader does not need."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
