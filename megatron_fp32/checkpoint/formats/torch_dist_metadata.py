"""Reads the file `.metadata` of a `torch_dist` checkpoint."""

from __future__ import annotations

import dataclasses
import io
import itertools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_fp32.checkpoint.formats.pickles import RestrictedUnpickler, enum_member
from megatron_fp32.errors import CheckpointError, summary
from megatron_fp32.weights.tensors import is_possible_shape

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
    # torch's writer stores the path of the directory that it wrote to.
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "builtins": {"set", "frozenset"},
}


class _MetadataUnpickler(RestrictedUnpickler):
    """Admits the classes of a checkpoint's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """The class. Raises CheckpointError for a class that a checkpoint's metadata does not need."""
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if module == "pathlib._local":  # the name in Python 3.13
            module = "pathlib"
        if name not in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        return getattr(__import__(module, fromlist=[name]), name)

    def takes_state(self, instance: Any) -> bool:
        """Dataclasses take a state, because the classes of a checkpoint's metadata are dataclasses."""
        return dataclasses.is_dataclass(instance) or super().takes_state(instance)


_LIMIT = 2**30
"""Largest size of the file in bytes. A chunk of a tensor takes a few hundred bytes."""


def read_metadata(path: Path) -> metadata.Metadata:
    """Read and check the file.

    Raises:
        CheckpointError: naming the file, when it is not the metadata of a checkpoint, or its content is impossible.
    """
    try:
        size = path.stat().st_size
        if size > _LIMIT:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {_LIMIT}")
        value = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(value, metadata.Metadata):
            raise CheckpointError(f"{path} holds a {type(value).__name__}, not the metadata of a checkpoint")
        if type(value.state_dict_metadata) is not dict or type(value.storage_data) is not dict:
            raise CheckpointError(f"{path} is damaged: state_dict_metadata and storage_data must be dictionaries")
        _check_entries(value, size)
        _check_places(value)
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle may raise any exception
        raise CheckpointError(f"{path} cannot be read: {summary(error)}") from error
    return value


def _check_entries(value: metadata.Metadata, size: int) -> None:
    """Check everything that reading tensors will need, so that damage shows here. Damage may raise any exception.

    Args:
        value: the metadata.
        size: bytes of the file.
    """
    count = 0
    for name, entry in value.state_dict_metadata.items():
        if not isinstance(name, str):
            raise TypeError(f"a tensor's name is a {type(name).__name__}")
        if isinstance(entry, metadata.BytesStorageMetadata):
            continue
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise TypeError(f"{name!r} is a {type(entry).__name__}")
        # A damaged file can repeat a chunk many times for a byte or two each, and tensors can share a list of chunks.
        count += len(entry.chunks)
        if type(entry.chunks) is not list or count > size:
            raise ValueError(
                f"the chunks of {name!r} are not a list, or there are more of them than the file has bytes"
            )
        dtype = entry.properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"the dtype of {name!r} is a {type(dtype).__name__}")
        for shape in (entry.size, *(s for chunk in entry.chunks for s in (chunk.offsets, chunk.sizes))):
            if not isinstance(shape, torch.Size):
                raise TypeError(f"shapes of {name!r} are not a torch.Size")
        for shape in (entry.size, *(chunk.sizes for chunk in entry.chunks)):
            if not is_possible_shape(shape, dtype):
                raise ValueError(f"{name!r} cannot have a chunk of shape {str(tuple(shape))[:200]}")


def _check_places(value: metadata.Metadata) -> None:
    """Raise if the place of an entry is invalid, or two entries overlap in a file."""
    places = []
    for index, where in value.storage_data.items():
        if not isinstance(index, metadata.MetadataIndex) or not isinstance(index.fqn, str):
            raise TypeError("storage_data has a key that is not a MetadataIndex with a name")
        numbers = (where.offset, where.length)
        if not isinstance(where.relative_path, str) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise TypeError(f"file, offset or length of {index.fqn!r} is invalid")
        if getattr(where, "transform_descriptors", None):
            raise CheckpointError(f"{index.fqn!r} is compressed or encrypted, which is not supported")
        places.append((where.relative_path, where.offset, where.offset + where.length, index.fqn))
    places.sort()
    for (file, _, end, name), (next_file, start, _, next_name) in itertools.pairwise(places):
        if file == next_file and start < end:
            raise ValueError(f"{name!r} and {next_name!r} overlap in {file!r}")
