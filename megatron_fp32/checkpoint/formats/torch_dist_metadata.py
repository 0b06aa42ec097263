"""The file `.metadata` of a `torch_dist` checkpoint."""

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
    # torch's own writer notes the directory that it wrote to.
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "builtins": {"set", "frozenset"},
}


class _MetadataUnpickler(RestrictedUnpickler):
    """Admits the classes of a checkpoint's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises CheckpointError for anything that a checkpoint's metadata does not need."""
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if module == "pathlib._local":  # Python 3.13's name for it
            module = "pathlib"
        if name not in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        return getattr(__import__(module, fromlist=[name]), name)

    def takes_state(self, instance: Any) -> bool:
        """The classes of a checkpoint's metadata are dataclasses."""
        return dataclasses.is_dataclass(instance) or super().takes_state(instance)


_LIMIT = 2**30
"""Bytes of the file. A chunk of a tensor takes some hundred."""


def read_metadata(path: Path) -> metadata.Metadata:
    """Read and check the file.

    Raises:
        CheckpointError: naming the file, when it is no metadata, or says what cannot be.
    """
    try:
        size = path.stat().st_size
        if size > _LIMIT:
            raise CheckpointError(f"{path} has {size} bytes; no metadata has more than {_LIMIT}")
        value = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(value, metadata.Metadata):
            raise CheckpointError(f"{path} holds a {type(value).__name__}, not the metadata of a checkpoint")
        if type(value.state_dict_metadata) is not dict or type(value.storage_data) is not dict:
            raise CheckpointError(f"{path} is damaged: its lists of tensors and of places are not dictionaries")
        _check_entries(value, size)
        _check_places(value)
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle may raise, or lack, anything
        raise CheckpointError(f"{path} cannot be read: {summary(error)}") from error
    return value


def _check_entries(value: metadata.Metadata, size: int) -> None:
    """Touch everything that reading will need, so that damage shows here. Raises whatever the damage raises.

    Args:
        value: what was read.
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
        # Tensors can share a list of chunks, and a list holds one chunk many times, at a byte or two each.
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
                raise ValueError(f"{name!r} cannot have a part of shape {str(tuple(shape))[:200]}")


def _check_places(value: metadata.Metadata) -> None:
    """No two parts lie in the same bytes."""
    places = []
    for index, where in value.storage_data.items():
        if not isinstance(index, metadata.MetadataIndex) or not isinstance(index.fqn, str):
            raise TypeError("the places of the data are damaged")
        numbers = (where.offset, where.length)
        if not isinstance(where.relative_path, str) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise TypeError(f"the place of {index.fqn!r} is damaged")
        if getattr(where, "transform_descriptors", None):
            raise CheckpointError(f"{index.fqn!r} is compressed or encrypted, which is not supported")
        places.append((where.relative_path, where.offset, where.offset + where.length, index.fqn))
    places.sort()
    for (file, _, end, name), (next_file, start, _, next_name) in itertools.pairwise(places):
        if file == next_file and start < end:
            raise ValueError(f"{name!r} and {next_name!r} lie in the same bytes of {file!r}")
