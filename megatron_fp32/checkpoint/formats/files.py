"""Bytes of files, read where they are asked for and nowhere else: no mmap, no position that others share."""

from __future__ import annotations

import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_fp32.errors import CheckpointError, summary

JSON_LIMIT = 2**29
"""Most bytes of a JSON file; an index of a million tensors has a quarter of that."""

_DIGITS = 300
_JSON_LEVELS = 100

_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % _DIGITS)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_BLOCK = 2**22
"""Bytes that are read at a time where a whole tensor would not fit, or not into caches."""


def read_into(file: BinaryIO, start: int, tensor: Tensor) -> memoryview:
    """Fill a contiguous tensor with bytes of a file, without a copy on the way.

    Args:
        file: opened without a buffer.
        start: position of the first byte.
        tensor: contiguous, on the CPU.

    Returns:
        the tensor's memory.

    Raises:
        EOFError: when the file ends before.
    """
    if not tensor.numel():
        return memoryview(b"")
    memory: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    file.seek(start)
    done = 0
    while done < len(memory):
        # A system call reads 2 GiB at most, and a network file system less.
        count = file.readinto(memory[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"the file ends {len(memory) - done} bytes early")
        done += count
    return memory


class Section(io.RawIOBase):
    """Bytes `[start, start + length)` of a file, as a file. Reads that `limit` forbids raise EOFError.

    Args:
        file: opened without a buffer.
        start: where it begins.
        length: of the section; it must lie in the file.
        limit: most bytes that one `read` may ask for: a damaged file can promise any number.

    Raises:
        EOFError: when the file ends before the section does.
    """

    def __init__(self, file: BinaryIO, start: int, length: int, *, limit: int = 2**24) -> None:
        size = os.fstat(file.fileno()).st_size
        if start < 0 or length < 0 or start + length > size:
            raise EOFError(f"bytes {start} to {start + length} are promised, the file has {size}")
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
        """Move; as for any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError(f"a position of {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; fewer only at the section's end."""
        left = max(0, self.length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if size > self._limit:
            raise EOFError(f"{size} bytes are promised where at most {self._limit} may be")
        content = torch.empty(size, dtype=torch.uint8)
        memory = self.read_into(self._position, content)
        self._position += size
        return bytes(memory)

    def read_into(self, start: int, tensor: Tensor) -> memoryview:
        """Fill a contiguous tensor with the bytes from `start` of the section on; see `read_into`."""
        if start < 0 or start + tensor.nbytes > self.length:
            raise EOFError(f"bytes {start} to {start + tensor.nbytes} are promised, there are {self.length}")
        return read_into(self._file, self._start + start, tensor)

    def blocks(self, start: int, length: int) -> Iterator[memoryview]:
        """A part, never in memory as a whole: each block takes the place of the one before."""
        block = torch.empty(min(length, _BLOCK), dtype=torch.uint8)
        for at in range(start, start + length, _BLOCK):
            yield self.read_into(at, block[: start + length - at])

    def crc32(self, start: int, length: int) -> int:
        """CRC-32 of a part."""
        value = 0
        for block in self.blocks(start, length):
            value = zlib.crc32(block, value)
        return value


def to_disk(path: Path) -> None:
    """Return when a file is on the disk, and no longer in the cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def parse_json(content: bytes, *, finite: bool = True) -> Any:
    """JSON that every reader understands alike and that can be printed: UTF-8 without halves of surrogate pairs, no key
    twice, finite numbers of at most 300 digits, at most 100 levels of objects and lists.

    Args:
        content: of the file.
        finite: False admits Infinity and NaN, which Python writes and released configs hold (`time_step_limit` of
            models with Mamba 2).

    Raises:
        ValueError: when it is none.
    """
    options: dict[str, Any] = {"parse_int": _integer} if _LONG_NUMBER.search(content) else {}
    if finite:
        options |= {"parse_constant": _finite, "parse_float": _finite}
    try:
        value = json.loads(
            content.decode(),
            object_pairs_hook=_without_duplicates,
            **options,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check_levels(value)
    if _SURROGATE.search(content):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path, what: str, *, finite: bool = True) -> Any:
    """A JSON file; see `parse_json`.

    Args:
        path: of the file.
        what: it should be, for the message.
        finite: as for `parse_json`.

    Raises:
        CheckpointError: naming the file, when it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise ValueError(f"it has {size} bytes, expected at most {JSON_LIMIT}")
        return parse_json(path.read_bytes(), finite=finite)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a {what}: {summary(error)}") from error


def read_json_object(path: Path, what: str = "JSON object", *, finite: bool = True) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object.

    Raises:
        CheckpointError: naming the file, when it cannot be read or holds something else.
    """
    content = read_json(path, what, finite=finite)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(_JSON_LEVELS + 1):
        level = [part for item in level for part in _inner(item) if type(part) in (dict, list)]
        if not level:
            return
    raise ValueError(f"nested too deeply: more than {_JSON_LEVELS} levels")


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:200]!r} is there twice")
        found[key] = value
    return found
