"""megatron-core's `torch_dist` checkpoints, read without a model, a GPU or a process group.

A checkpoint is a directory: `.metadata`, a pickled `torch.distributed.checkpoint.metadata.Metadata` that says where
each chunk of each tensor lies; `*.distcp`, concatenated `torch.save` blobs; `metadata.json`, which names the format;
and, up to megatron-core 0.18, `common.pt` for what is no tensor (from 0.19 on the object `common_state` holds it; both
are written).
"""

from __future__ import annotations

import collections
import enum
import io
import itertools
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_fp32.checkpoint.huggingface import CheckpointError, TensorInfo

TRACKER = "latest_checkpointed_iteration.txt"

_ALLOWED = {
    metadata.__name__: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    planner.__name__: {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType", "BytesIOWriteData"},
    filesystem.__name__: {"_StorageInfo"},
    "torch": {"Size", *(str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    # torch's own writer notes the directory that it wrote to.
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "builtins": {"set", "frozenset"},
}


def find_checkpoint(path: str | Path) -> Path:
    """The directory with `.metadata`: `path` itself, or the one that its tracker file names.

    Raises:
        CheckpointError: when there is none, or it has another format.
    """
    root = Path(path)
    tracker = root / TRACKER
    if not (root / ".metadata").is_file() and tracker.is_file():
        step = tracker.read_text().strip()
        if step != "release" and not step.isdecimal():
            raise CheckpointError(f"{tracker} must hold 'release' or an iteration, got {step[:40]!r}")
        root = root / (step if step == "release" else f"iter_{int(step):07d}")
    if not (root / ".metadata").is_file():
        raise CheckpointError(f"{path} is no torch_dist checkpoint: no .metadata in {root}, and no {TRACKER} beside")
    declared = root / "metadata.json"
    if declared.is_file():
        try:
            backend = json.loads(declared.read_text())["sharded_backend"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{declared} is damaged: {error!r}") from error
        if backend != "torch_dist":
            raise CheckpointError(f"{declared}: expected sharded_backend 'torch_dist', got {backend!r}")
    return root


class TorchDistReader:
    """The tensors of a `torch_dist` checkpoint, whatever parallel sizes it was saved with.

    Args:
        path: see `find_checkpoint`.

    Attributes:
        tensors: global shape and dtype of every tensor.
        objects: names of the other entries.

    Raises:
        CheckpointError: when it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = find_checkpoint(path)
        self._metadata = _read_metadata(self.directory / ".metadata")
        self._by_index: dict[tuple[str, int], dict[tuple[int, ...], list[metadata.ChunkStorageMetadata]]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.objects: list[str] = []
        for name, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, metadata.TensorStorageMetadata):
                self.tensors[name] = TensorInfo(dtype=entry.properties.dtype, shape=tuple(entry.size))
            else:
                self.objects.append(name)

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """A tensor, put together from its chunks, or `tensor[index]`, for which only the chunks that hold it are read.

        Raises:
            CheckpointError: when chunks are missing, overlap, or hold something else than the metadata says.
        """
        entry = self._metadata.state_dict_metadata[name]
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise CheckpointError(f"{self.directory}: {name!r} is no tensor")
        result = torch.empty(tuple(entry.size)[len(index) :], dtype=entry.properties.dtype)
        for chunk in self._chunks(name, entry, len(index)).get(index, ()):
            inside = tuple(at - start for at, start in zip(index, chunk.offsets, strict=False))
            value = self._read_chunk(metadata.MetadataIndex(name, chunk.offsets), chunk, entry.properties.dtype)
            result[_box(chunk)[len(index) :]] = value[inside]
        return result

    def _chunks(
        self, name: str, entry: metadata.TensorStorageMetadata, axes: int
    ) -> dict[tuple[int, ...], list[metadata.ChunkStorageMetadata]]:
        """For every index of the first axes, the chunks that hold something of it."""
        if (name, axes) not in self._by_index:
            if not covers(entry):
                raise CheckpointError(
                    f"{self.directory}: the chunks of {name!r} do not make up the {tuple(entry.size)} tensor"
                )
            found: dict[tuple[int, ...], list[metadata.ChunkStorageMetadata]] = {}
            for chunk in entry.chunks:
                for index in itertools.product(*(range(s.start, s.stop) for s in _box(chunk)[:axes])):
                    found.setdefault(index, []).append(chunk)
            self._by_index[name, axes] = found
        return self._by_index[name, axes]

    def _read_chunk(
        self, index: metadata.MetadataIndex, chunk: metadata.ChunkStorageMetadata, dtype: torch.dtype
    ) -> Tensor:
        where = self._metadata.storage_data.get(index)
        if where is None:
            raise CheckpointError(f"{self.directory}: no data for {index.fqn!r} at {tuple(chunk.offsets)}")
        file = self.directory / where.relative_path
        if Path(where.relative_path).name != where.relative_path or not file.is_file():
            raise CheckpointError(
                f"{self.directory}: the data file {where.relative_path!r} of {index.fqn!r} is missing"
            )
        try:
            with file.open("rb") as stream:
                stream.seek(where.offset)
                blob = stream.read(where.length)
            value = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
            raise CheckpointError(f"{file}: the data of {index.fqn!r} is damaged: {error}") from error
        if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != chunk.sizes:
            raise CheckpointError(f"{file}: the data of {index.fqn!r} is not the {dtype} {tuple(chunk.sizes)} promised")
        return value


def _box(chunk: metadata.ChunkStorageMetadata) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))


def covers(entry: metadata.TensorStorageMetadata) -> bool:
    """The chunks lie inside the tensor, do not overlap, and cover it.

    They do exactly when their indicator functions add up to the tensor's, and these are determined by their corners,
    each with the sign of its derivative. That takes as long as there are chunks, not pairs of chunks.
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


def _read_metadata(path: Path) -> metadata.Metadata:
    try:
        value = _RestrictedUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(value, metadata.Metadata):
            raise CheckpointError(f"{path} holds a {type(value).__name__}, not the metadata of a checkpoint")
        _check_metadata(value)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise, or lack, anything
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    return value


def _check_metadata(value: metadata.Metadata) -> None:
    """Touch everything that reading will need, so that damage shows here. Raises whatever the damage raises."""
    for name, entry in value.state_dict_metadata.items():
        if not isinstance(name, str):
            raise TypeError(f"a tensor's name is a {type(name).__name__}")
        if isinstance(entry, metadata.TensorStorageMetadata):
            shapes = [entry.size, *(s for chunk in entry.chunks for s in (chunk.offsets, chunk.sizes))]
            if not all(isinstance(shape, torch.Size) for shape in shapes):
                raise TypeError(f"shapes of {name!r} are no torch.Size")
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError(f"the dtype of {name!r} is a {type(entry.properties.dtype).__name__}")
    for index, where in value.storage_data.items():
        if not isinstance(index, metadata.MetadataIndex) or not isinstance(where.relative_path, str):
            raise TypeError("the places of the data are damaged")
        if not (isinstance(where.offset, int) and isinstance(where.length, int) and where.offset >= 0):
            raise TypeError(f"the place of {index.fqn!r} is damaged")


class _RestrictedUnpickler(pickle.Unpickler):
    """Admits the classes of a checkpoint's metadata, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises CheckpointError for anything that a checkpoint's metadata does not need."""
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name not in _ALLOWED.get(module, ()):
            raise CheckpointError(f"the checkpoint's .metadata asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Any:
    """Python 3.11.2 and its like pickle the member of an enumeration as `getattr(class, name)`."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum)) or name not in owner.__members__:
        raise CheckpointError(f"the checkpoint's .metadata asks for {name!r} of {owner!r}, which no checkpoint needs")
    return owner[name]


def known_non_model_entries(names: Iterable[str]) -> list[str]:
    """Of a checkpoint's entries, those that are not the model's: optimizer, generators, common state."""
    prefixes = ("optimizer.", "chained_", "rng_state", "rerun_state", "common_state", "opt_param_scheduler")
    return [name for name in names if name.startswith(prefixes)]
