"""What a push will send, announced before the first byte."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

from megatron_fp32.errors import TransferError
from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, TensorInfo

MAX_MANIFEST_BYTES = 256 << 20
"""Of the JSON text. A million tensors need about 100 MB."""
MAX_TENSORS = 4_000_000
MAX_TENSOR_BYTES = 1 << 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Version, names, shapes and dtypes of a push, in the order in which the tensors come.

    Digests are not here: they would need every value before the first one is sent, so the model would be gathered
    twice. The checksum of a bucket comes behind the bucket, and SHA-256 digests come behind the last one.
    """

    version: int
    tensors: Mapping[str, TensorInfo]
    bucket_bytes: int
    """Both sides plan the same buckets with it; see `plan_buckets`."""
    sha256: bool
    """Whether both sides also compute SHA-256 of every tensor."""
    carried: tuple[str, ...] = ()
    """Tensors of the checkpoint that the trainer does not have, such as a vision tower. The engine keeps its own."""

    def to_bytes(self) -> bytes:
        """A compressed JSON text."""
        tensors = [[name, DTYPE_NAMES[info.dtype], list(info.shape)] for name, info in self.tensors.items()]
        fields: dict[str, Any] = {"version": self.version, "bucket_bytes": self.bucket_bytes, "sha256": self.sha256}
        fields["carried"] = list(self.carried)
        return zlib.compress(json.dumps(fields | {"tensors": tensors}).encode(), level=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read what `to_bytes` wrote.

        Raises:
            TransferError: for anything that `to_bytes` does not write, before memory is spent on it.
        """
        decompressor = zlib.decompressobj()
        try:
            text = decompressor.decompress(data, MAX_MANIFEST_BYTES)
            if not decompressor.eof:
                raise TransferError(f"the manifest is cut off or longer than {MAX_MANIFEST_BYTES} bytes")
            fields = json.loads(text)
            tensors = {str(name): _info(name, dtype, shape) for name, dtype, shape in fields["tensors"]}
            manifest = cls(
                version=_count(fields["version"]),
                tensors=tensors,
                bucket_bytes=_count(fields["bucket_bytes"]),
                sha256=fields["sha256"] is True,
                carried=tuple(str(name) for name in fields["carried"]),
            )
        except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
            raise TransferError(f"this is not a manifest: {type(error).__name__}: {error}") from error
        if len(tensors) != len(fields["tensors"]) or len(tensors) > MAX_TENSORS:
            raise TransferError(f"the manifest has repeated names, or more than {MAX_TENSORS} tensors")
        return manifest


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a count, got {value!r}")
    return value


def _info(name: Any, dtype: Any, shape: Any) -> TensorInfo:
    sizes = tuple(_count(size) for size in shape)
    if dtype not in DTYPES or not isinstance(name, str):
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if math.prod(sizes) * DTYPES[dtype].itemsize > MAX_TENSOR_BYTES:
        raise ValueError(f"tensor {name!r} of shape {sizes} is larger than {MAX_TENSOR_BYTES} bytes")
    return TensorInfo(dtype=DTYPES[dtype], shape=sizes)
