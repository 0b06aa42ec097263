"""Reads megatron-core's `torch_dist` checkpoints, without a model, a GPU or a process group.

A checkpoint is a directory with these files:

- `.metadata`: a pickled `torch.distributed.checkpoint.metadata.Metadata`, with the place of each chunk of each tensor.
- `*.distcp`: concatenated blobs of `torch.save`.
- `metadata.json`: the name of the format.
- `common.pt`: the common state, which is not tensors, up to megatron-core 0.18. Since 0.19, the object `common_state`
  holds it. An import writes both.
"""

from __future__ import annotations

import collections
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata

from megatron_fp32.checkpoint.formats.directory_checks import (
    complete_ones,
    existing_directory,
    refuse_pointers,
    why_no_checkpoint,
)
from megatron_fp32.checkpoint.formats.json_file import read_json
from megatron_fp32.checkpoint.formats.safetensors_file import flat_index
from megatron_fp32.checkpoint.formats.torch_dist_metadata import read_metadata
from megatron_fp32.checkpoint.formats.torch_file import open_torch_file
from megatron_fp32.errors import CheckpointError, summary
from megatron_fp32.weights.tensors import TensorInfo, empty_tensor, info_of

TRACKER = "latest_checkpointed_iteration.txt"


def find_checkpoint(path: str | Path) -> Path:
    """The directory with `.metadata`: `path` itself, or the directory that its tracker file names.

    Raises:
        CheckpointError: when there is no such directory, or the checkpoint has another format.
    """
    root = existing_directory(path)
    tracker = root / TRACKER
    if not (root / ".metadata").is_file() and tracker.is_file():
        step = _read_tracker(tracker)
        root = root / (step if step == "release" else f"iter_{int(step):07d}")
    if not (root / ".metadata").is_file():
        raise CheckpointError(why_no_checkpoint(Path(path), root, tracker))
    refuse_pointers([root / ".metadata", root / "metadata.json", root / "common.pt", *sorted(root.glob("*.distcp"))])
    declared = root / "metadata.json"
    if declared.is_file():
        content = read_json(declared, "declaration of a checkpoint format")
        backend = content.get("sharded_backend") if isinstance(content, dict) else None
        if backend != "torch_dist":
            raise CheckpointError(
                f"{declared}: expected sharded_backend 'torch_dist', got {backend!r}. To convert the checkpoint, load "
                "it in Megatron with --ckpt-convert-format torch_dist --ckpt-convert-save DIR"
            )
    return root


def _read_tracker(path: Path) -> str:
    try:
        with path.open("rb") as file:
            step = file.read(64).decode(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {summary(error)}") from error
    if step != "release" and not re.fullmatch("[0-9]{1,18}", step):
        refuse_pointers([path])
        raise CheckpointError(
            f"{path} must hold 'release' or the number of an iteration, got {step[:40]!r}; {complete_ones(path.parent)}"
        )
    return step


class TorchDistReader:
    """Reads the tensors of a `torch_dist` checkpoint, of any parallel sizes. It is a `TensorSource`.

    Args:
        path: see `find_checkpoint`.

    Attributes:
        tensors: global shape and dtype of every tensor.
        objects: names of the entries that are not tensors.

    Raises:
        CheckpointError: when the checkpoint cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = find_checkpoint(path)
        self._listing = self.directory / ".metadata"
        self._metadata = read_metadata(self._listing)
        self._by_index: dict[tuple[str, int], dict[tuple[int, ...], list[metadata.ChunkStorageMetadata]]] = {}
        self._checked: set[tuple[str, int]] = set()
        self.tensors: dict[str, TensorInfo] = {}
        self.objects: list[str] = []
        for name, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, metadata.TensorStorageMetadata):
                self.tensors[name] = info_of(entry.properties.dtype, entry.size)
            else:
                self.objects.append(name)

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read a tensor, or only `tensor[index]`, from its chunks.

        If the data has checksums, they are compared once for each chunk.

        Raises:
            CheckpointError: when chunks are missing, overlap, or do not match the metadata.
            IndexError: when the tensor does not have this index.
        """
        entry = self._metadata.state_dict_metadata[name]
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise CheckpointError(f"{self.directory}: {name!r} is not a tensor")
        flat_index(index, tuple(entry.size))
        chunks = self._chunks(name, entry, len(index)).get(index, ())
        result = empty_tensor(entry.size[len(index) :], entry.properties.dtype)
        for chunk in chunks:
            inside = tuple(at - start for at, start in zip(index, chunk.offsets, strict=False))
            self._read_chunk(name, chunk, inside, result[_box(chunk)[len(index) :]])
        return result

    def place_of_object(self, name: str) -> tuple[Path, int, int]:
        """(file, position of the first byte, number of bytes) of an object.

        Raises:
            CheckpointError: when the object is missing.
        """
        file, where = self._place(metadata.MetadataIndex(name))
        return file, where.offset, where.length

    def _chunks(
        self, name: str, entry: metadata.TensorStorageMetadata, axes: int
    ) -> dict[tuple[int, ...], list[metadata.ChunkStorageMetadata]]:
        """For every index of the first `axes` axes, the chunks with values of it."""
        if (name, axes) not in self._by_index:
            # The test takes twice as long for each axis, and no known tensor has more than 8.
            if len(entry.size) > 8 or not covers(entry):
                raise CheckpointError(
                    f"{self._listing}: the chunks of {name!r} do not make up the {tuple(entry.size)} tensor"
                )
            found: dict[tuple[int, ...], list[metadata.ChunkStorageMetadata]] = {}
            for chunk in entry.chunks:
                if not chunk.sizes.numel():
                    continue
                _, where = self._place(metadata.MetadataIndex(name, chunk.offsets))
                nbytes = chunk.sizes.numel() * entry.properties.dtype.itemsize
                if nbytes > where.length:
                    raise CheckpointError(
                        f"{self._listing}: the data of {name!r} has {where.length} bytes, expected at least {nbytes}"
                    )
                for index in itertools.product(*(range(s.start, s.stop) for s in _box(chunk)[:axes])):
                    found.setdefault(index, []).append(chunk)
            self._by_index[name, axes] = found
        return self._by_index[name, axes]

    def _place(self, index: metadata.MetadataIndex) -> tuple[Path, Any]:
        """The file of a chunk or an object, and its byte range there."""
        name, where = index.fqn, self._metadata.storage_data.get(index)
        if where is None:
            at = f" at {tuple(index.offset)}" if index.offset is not None else ""
            raise CheckpointError(f"{self._listing}: there is no data for {name!r}{at}")
        file = self.directory / where.relative_path
        if Path(where.relative_path).name != where.relative_path or not os.path.isfile(file):
            raise CheckpointError(f"{self.directory}: the data file {where.relative_path!r} of {name!r} is missing")
        if where.offset + where.length > file.stat().st_size:
            raise CheckpointError(f"{file}: the data of {name!r} is damaged: the file ends before the data")
        return file, where

    def _read_chunk(
        self, name: str, chunk: metadata.ChunkStorageMetadata, index: tuple[int, ...], target: Tensor
    ) -> None:
        """Read `chunk[index]` into `target`."""
        file, where = self._place(metadata.MetadataIndex(name, chunk.offsets))
        place = (where.relative_path, where.offset)
        with open_torch_file(file, f"the data of {name!r}", where.offset, where.length) as blob:
            stored = blob.tensor()
            is_right = stored.dtype == target.dtype and stored.shape == tuple(chunk.sizes)
            if is_right:
                blob.read_into(stored, index, target, is_checked=place in self._checked)
        if not is_right:
            raise CheckpointError(
                f"{file}: the data of {name!r} is not {target.dtype} {tuple(chunk.sizes)}, as .metadata says"
            )
        self._checked.add(place)


def _box(chunk: metadata.ChunkStorageMetadata) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))


def covers(entry: metadata.TensorStorageMetadata) -> bool:
    """Whether the chunks lie inside the tensor, do not overlap, and cover it.

    That is so exactly when the indicator functions of the chunks add up to the indicator function of the tensor. The
    indicator function of a box is determined by its corners, with the sign of its mixed derivative at each. So the time
    is proportional to the number of chunks, not of pairs of chunks.
    """
    whole = metadata.ChunkStorageMetadata(offsets=torch.Size([0] * len(entry.size)), sizes=entry.size)
    if any(len(chunk.offsets) != len(entry.size) or len(chunk.sizes) != len(entry.size) for chunk in entry.chunks):
        return False
    if any(size < 0 for chunk in entry.chunks for size in chunk.sizes):
        return False
    corners: collections.Counter[tuple[int, ...]] = collections.Counter()
    for sign, chunk in [(1, whole), *((-1, chunk) for chunk in entry.chunks)]:
        for ends in itertools.product((0, 1), repeat=len(entry.size)):
            corner = tuple(o + end * s for o, s, end in zip(chunk.offsets, chunk.sizes, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())


def known_non_model_entries(names: Iterable[str]) -> list[str]:
    """The names of entries that do not belong to the model, such as optimizer states, generators and common state."""
    prefixes = ("optimizer.", "chained_", "rng_state", "rerun_state", "common_state", "opt_param_scheduler")
    return [name for name in names if name.startswith(prefixes)]
