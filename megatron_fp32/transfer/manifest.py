"""What a push will send, announced before the first byte."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_fp32.errors import TransferError, summary
from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, FLOAT4, TensorInfo, is_possible_shape

MAX_TEXT_BYTES = 256 << 20
"""Of the lines. A million tensors need about 100 MB."""
MAX_LINE_BYTES = 1 << 16
MAX_TENSORS = 1_000_000
MAX_TENSOR_BYTES = 1 << 40
MAX_BUCKET_BYTES = 1 << 40
_CHUNK = 1 << 18


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
        """Compressed lines of JSON: the head, the carried names, and every tensor.

        Raises:
            TransferError: for a tensor that `from_bytes` refuses.
        """
        head = [self.version, self.bucket_bytes, self.sha256, len(self.carried), len(self.tensors)]
        rows = ([name, DTYPE_NAMES[info.dtype], list(info.shape)] for name, info in self.tensors.items())
        for name, info in self.tensors.items():
            try:
                _info(DTYPE_NAMES[info.dtype], list(info.shape))
            except ValueError as error:
                raise TransferError(f"tensor {name!r} cannot be sent: {error}") from error
        text = "".join(f"{json.dumps(row)}\n" for row in (head, *self.carried, *rows))
        return zlib.compress(text.encode(), level=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read what `to_bytes` wrote.

        Each line is read before the next one is decompressed, so that no small message can take much memory.

        Raises:
            TransferError: for anything that `to_bytes` does not write.
        """
        try:
            rows = (json.loads(line) for line in _lines(data))
            version, bucket_bytes, sha256, number_carried, number = next(rows)
            version, bucket_bytes = _count(version), _count(bucket_bytes, MAX_BUCKET_BYTES)
            if _count(number_carried, MAX_TENSORS) + _count(number, MAX_TENSORS) > MAX_TENSORS:
                raise ValueError(f"expected at most {MAX_TENSORS} tensors")
            if not isinstance(sha256, bool):
                raise ValueError(f"expected a bool, got {sha256!r}")
            carried = tuple([_name(next(rows)) for _ in range(number_carried)])
            tensors: dict[str, TensorInfo] = {}
            for _ in range(number):
                name, dtype, shape = next(rows)
                if _name(name) in tensors:
                    raise ValueError(f"tensor {name!r} comes twice")
                tensors[name] = _info(dtype, shape)
            for _ in rows:
                raise ValueError(f"expected {number} tensors, got more")
        except StopIteration:
            raise TransferError("this is not a manifest: it is cut off") from None
        except (zlib.error, ValueError, TypeError, RecursionError) as error:
            raise TransferError(f"this is not a manifest: {summary(error)}") from error
        return cls(version=version, tensors=tensors, bucket_bytes=bucket_bytes, sha256=sha256, carried=carried)


def _lines(data: bytes) -> Iterator[bytes]:
    """Lines of a compressed text, as they are asked for."""
    rest, size = b"", 0
    for chunk in _decompressed(data):
        size += len(chunk)
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"expected at most {MAX_TEXT_BYTES} bytes, got more")
        *lines, rest = (rest + chunk).split(b"\n")
        if any(len(line) > MAX_LINE_BYTES for line in (*lines, rest)):
            raise ValueError(f"expected lines of at most {MAX_LINE_BYTES} bytes")
        yield from lines
    if rest:
        raise ValueError(f"expected the end of a line, got {rest!r}")


def _decompressed(data: bytes) -> Iterator[bytes]:
    """A compressed text in chunks."""
    decompressor = zlib.decompressobj()
    for start in range(0, len(data), _CHUNK):
        part, chunk = data[start : start + _CHUNK], bytes(_CHUNK)
        while (part or len(chunk) == _CHUNK) and not decompressor.eof:
            chunk = decompressor.decompress(part, _CHUNK)
            part = decompressor.unconsumed_tail
            yield chunk
        if decompressor.eof:
            if decompressor.unused_data or start + _CHUNK < len(data):
                raise ValueError("expected the end of the manifest, got more bytes")
            return
    raise ValueError("it is cut off")


def _count(value: Any, most: int = (1 << 63) - 1) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"expected a count of at most {most}, got {value!r}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a name, got {value!r}")
    return value


def _info(dtype: Any, shape: Any) -> TensorInfo:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"expected a dtype of safetensors, got {dtype!r}")
    if not isinstance(shape, list) or not is_possible_shape(tuple(shape), DTYPES[dtype]):
        raise ValueError(f"expected a shape, got {shape!r}")
    info = TensorInfo(dtype=DTYPES[dtype], shape=tuple(shape))
    if info.dtype == FLOAT4 and (not shape or shape[-1] % 2 != 0):
        raise ValueError(f"expected an even number of {dtype} values on the last axis, got shape {shape}")
    if info.nbytes > MAX_TENSOR_BYTES:
        raise ValueError(f"expected at most {MAX_TENSOR_BYTES} bytes, got shape {shape} of {dtype}")
    return info
