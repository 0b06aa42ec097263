"""Reads byte ranges of files, and writes files to the disk. No mmap, and no file position that is shared."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_BLOCK = 2**22
"""Bytes that are read at a time if a whole tensor would not fit into memory, or not into caches."""


def read_into(file: BinaryIO, start: int, tensor: Tensor) -> memoryview:
    """Fill a contiguous tensor with bytes of a file, without an intermediate copy.

    Args:
        file: a file that was opened without a buffer.
        start: position of the first byte.
        tensor: a contiguous tensor on the CPU.

    Returns:
        The tensor's memory.

    Raises:
        EOFError: when the file ends before the tensor is full.
    """
    if not tensor.numel():
        return memoryview(b"")
    memory: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    file.seek(start)
    done = 0
    while done < len(memory):
        # A system call reads at most 2 GiB, on a network file system less.
        count = file.readinto(memory[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"the file ends {len(memory) - done} bytes early")
        done += count
    return memory


class Section(io.RawIOBase):
    """Bytes `[start, start + length)` of a file, as a file.

    Args:
        file: a file that was opened without a buffer.
        start: position of the section's first byte.
        length: bytes of the section, which must lie in the file.
        limit: most bytes that one `read` returns; a larger read raises EOFError. A damaged file can claim any number.

    Raises:
        EOFError: when the file ends before the section.
    """

    def __init__(self, file: BinaryIO, start: int, length: int, *, limit: int = 2**24) -> None:
        size = os.fstat(file.fileno()).st_size
        if start < 0 or length < 0 or start + length > size:
            raise EOFError(f"expected bytes {start} to {start + length}, but the file has {size} bytes")
        self.length = length
        self._file, self._start, self._limit = file, start, limit
        self._position = 0

    def seekable(self) -> bool:
        """True."""
        return True

    def readable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position in the section."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, as in any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError(f"expected a position of 0 or more, got {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; fewer only at the section's end."""
        left = max(0, self.length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if size > self._limit:
            raise EOFError(f"expected at most {self._limit} bytes, but the file claims {size}")
        content = torch.empty(size, dtype=torch.uint8)
        memory = self.read_into(self._position, content)
        self._position += size
        return bytes(memory)

    def read_into(self, start: int, tensor: Tensor) -> memoryview:
        """Fill a contiguous tensor with the bytes from `start` of the section on; see `read_into`."""
        if start < 0 or start + tensor.nbytes > self.length:
            raise EOFError(f"expected bytes {start} to {start + tensor.nbytes}, but there are {self.length} bytes")
        return read_into(self._file, self._start + start, tensor)

    def blocks(self, start: int, length: int) -> Iterator[memoryview]:
        """`length` bytes from `start` on, block by block. Each block overwrites the memory of the previous block."""
        block = torch.empty(min(length, _BLOCK), dtype=torch.uint8)
        for at in range(start, start + length, _BLOCK):
            yield self.read_into(at, block[: start + length - at])

    def crc32(self, start: int, length: int) -> int:
        """CRC-32 of `length` bytes from `start` on."""
        value = 0
        for block in self.blocks(start, length):
            value = zlib.crc32(block, value)
        return value


def to_disk(path: Path) -> None:
    """Write a file to the disk and drop it from the page cache, before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
