"""Which tensors travel together, and where in a buffer each of them lies.

A bucket is a buffer of bytes: tensors one after the other, each at a multiple of 256 bytes, and a trailer with the
checksum of what precedes it. vLLM's and SGLang's own packed buffers have no padding, so that a tensor with an odd size
makes the next one unreadable. Both sides plan the buckets from the manifest, so that no bucket needs a header.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from megatron_fp32.weights.tensors import TensorInfo

ALIGNMENT = 256
"""Of every tensor and of the trailer, in bytes: what torch's own allocator gives, and more than any dtype needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies in its bucket."""

    name: str
    info: TensorInfo
    start: int
    """In bytes from the beginning of the bucket."""

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor inside of a buffer, without a copy.

        Args:
            buffer: uint8 [at least `Bucket.nbytes`].
        """
        return buffer[self.start : self.start + self.info.nbytes].view(self.info.dtype).view(self.info.torch_shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tensors that travel in one buffer."""

    places: tuple[Place, ...]
    payload: int
    """Bytes before the trailer; a multiple of `ALIGNMENT`."""

    @property
    def nbytes(self) -> int:
        """Of the buffer, with the trailer."""
        return self.payload + ALIGNMENT

    def split(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """(payload, the checksum's 8 bytes) of a buffer."""
        return buffer[: self.payload], buffer[self.payload : self.payload + 8]


def plan_buckets(tensors: Mapping[str, TensorInfo], bucket_bytes: int) -> list[Bucket]:
    """Distribute tensors over buckets, in their order.

    A bucket is closed before it grows past `bucket_bytes`. A tensor that is larger gets a bucket of its own.
    """
    buckets: list[Bucket] = []
    places: list[Place] = []
    end = 0
    for name, info in tensors.items():
        size = aligned(info.nbytes)
        if places and end + size > bucket_bytes:
            buckets.append(Bucket(places=tuple(places), payload=end))
            places, end = [], 0
        places.append(Place(name=name, info=info, start=end))
        end += size
    if places:
        buckets.append(Bucket(places=tuple(places), payload=end))
    return buckets


def aligned(nbytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
