"""Reads files of `torch.save`, compares their checksums, and never allocates more memory than the file can fill.

The format (torch/serialization.py, `_save`) is a zip archive whose members are stored, not compressed:

- `NAME/data.pkl`: a pickle in which storages are persistent ids.
- `NAME/data/KEY`: the bytes of each storage.
- `NAME/byteorder`.

Each member has a CRC-32, which `torch.load` does not read. All CRCs are 0 if the writer left them out
(`torch.serialization.set_crc32_options(False)`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.checkpoint.formats.pickles import RestrictedUnpickler
from megatron_fp32.checkpoint.formats.section import Section
from megatron_fp32.errors import CheckpointError, summary
from megatron_fp32.weights.tensors import empty_tensor, is_possible_shape

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")

# Signatures that may follow a member's bytes: of a data descriptor, of the next member, of the directory.
_AFTER = (b"PK\x07\x08", b"PK\3\4", b"PK\1\2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """The place of a tensor's values in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    key: str
    """The key of the storage."""
    offset: int
    """Position of the first value in the storage, counted in values."""

    @property
    def is_contiguous(self) -> bool:
        """Whether the values lie one after another in row-major order."""
        if not math.prod(self.shape):
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def span(self) -> int:
        """Number of values in the storage from the tensor's first value to its last."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


class TorchFile:
    """A file, or a section of one, that `torch.save` wrote. `open_torch_file` makes it."""

    def __init__(self, section: Section) -> None:
        self.size = section.length
        self._section = section
        with zipfile.ZipFile(section) as archive:
            members = archive.infolist()
        self._members = {member.filename: member for member in members}
        if len(self._members) != len(members):
            raise ValueError("two members have one name")
        self._has_checksums = any(member.CRC for member in members)
        pickles = [name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"expected one member named data.pkl, got {len(pickles)}")
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._root + "byteorder"
        if order in self._members and self._content(order) != b"little":
            raise ValueError("its bytes are not in little-endian order")

    def tensor(self) -> StoredTensor:
        """The saved tensor. Its values are not read yet.

        Raises:
            CheckpointError: when the file does not hold a plain tensor, but for example a sparse tensor.
        """
        value = TensorUnpickler(self).load()
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f"it is a {type(value).__name__}, not a tensor")
        return value

    def pickle(self) -> io.BytesIO:
        """The pickle in the file."""
        return io.BytesIO(self._content(self._root + "data.pkl"))

    def storage_size(self, key: str) -> int:
        """Size of a storage in bytes."""
        return self._member(f"{self._root}data/{key}").file_size

    def read_into(
        self, stored: StoredTensor, index: tuple[int, ...], target: Tensor, *, is_checked: bool = False
    ) -> None:
        """Read only `tensor[index]` into `target`.

        Args:
            stored: the tensor in the file.
            index: positions on its first axes.
            target: the tensor to fill, with the shape and dtype of `tensor[index]`, contiguous or not.
            is_checked: True if the checksum of the tensor's storage was compared before. Otherwise the whole storage is
                read once for its checksum, block by block, before a part of it is read.

        Raises:
            ValueError: when the values do not have the checksum in the file.
        """
        if not target.numel():
            return
        if not stored.is_contiguous:
            part = empty_tensor((stored.span,), stored.dtype)
            self._read(stored, stored.offset, part, is_checked)
            target.copy_(part.as_strided(stored.shape, stored.strides)[index])
            return
        first = stored.offset + sum(at * stride for at, stride in zip(index, stored.strides, strict=False))
        part = target if target.is_contiguous() else empty_tensor(target.shape, stored.dtype)
        self._read(stored, first, part, is_checked)
        if part is not target:
            target.copy_(part)

    def blocks(self, stored: StoredTensor) -> Iterator[memoryview]:
        """The bytes of a contiguous tensor, a few megabytes at a time. Checksums are not compared.

        Raises:
            ValueError: for a tensor that is not contiguous, or does not fit into its storage.
        """
        member = self._member(f"{self._root}data/{stored.key}")
        start, nbytes = stored.offset * stored.dtype.itemsize, math.prod(stored.shape) * stored.dtype.itemsize
        if not stored.is_contiguous or start + nbytes > member.file_size:
            raise ValueError(f"the values of {stored} are not {nbytes} bytes of its storage")
        yield from self._section.blocks(self._start(member) + start, nbytes)

    def _read(self, stored: StoredTensor, first: int, part: Tensor, is_checked: bool) -> None:
        member = self._member(f"{self._root}data/{stored.key}")
        start, is_whole = self._start(member), part.nbytes == member.file_size
        if not is_whole and not is_checked and self._has_checksums:
            self._compare(member, self._section.crc32(start, member.file_size))
        memory = self._section.read_into(start + first * stored.dtype.itemsize, part)
        if is_whole and self._has_checksums:
            self._compare(member, zlib.crc32(memory))

    def _content(self, name: str) -> bytes:
        member = self._member(name)
        self._section.seek(self._start(member))
        content = self._section.read(member.file_size)
        if self._has_checksums:
            self._compare(member, zlib.crc32(content))
        return content

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise ValueError(f"the member {name[:200]!r} is missing")
        return self._members[name]

    def _start(self, member: zipfile.ZipInfo) -> int:
        """Position of the first byte of a member."""
        if member.compress_type or member.flag_bits & 1 or member.file_size != member.compress_size:
            raise ValueError(f"the member {member.filename[:200]!r} is compressed or encrypted")
        self._section.seek(member.header_offset)
        fields = self._section.read(_LOCAL_HEADER.size)
        signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(fields)
        name = self._section.read(name_length)
        if signature != b"PK\3\4" or name != member.orig_filename.encode(
            "utf-8" if member.flag_bits & 0x800 else "cp437"
        ):
            raise ValueError(f"the member {member.filename[:200]!r} is not where the directory says")
        start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        # The signature after the member shows that its bytes begin at `start`, even without a checksum.
        self._section.seek(start + member.file_size)
        if self._section.read(4) not in _AFTER:
            raise ValueError(f"the member {member.filename[:200]!r} does not end where another begins")
        return start

    @staticmethod
    def _compare(member: zipfile.ZipInfo, checksum: int) -> None:
        if checksum != member.CRC:
            raise ValueError(f"the checksum of {member.filename!r} is {checksum:#x}, not {member.CRC:#x}")


@contextlib.contextmanager
def open_torch_file(path: Path, what: str, offset: int = 0, length: int | None = None) -> Iterator[TorchFile]:
    """Open a file of `torch.save`, or `length` bytes of a file from `offset` on.

    Args:
        path: path of the file.
        what: the content of the file, for messages.
        offset: position of the first byte.
        length: number of bytes; None for all bytes up to the end of the file.

    Raises:
        CheckpointError: naming the file and `what`, for every exception from the file or from the block.
    """
    try:
        with path.open("rb", buffering=0) as file:
            length = path.stat().st_size - offset if length is None else length
            yield TorchFile(Section(file, offset, length))
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error) if isinstance(error, CheckpointError) else summary(error)
        raise CheckpointError(f"{path}: {what} is damaged: {reason}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Storage:
    key: str
    dtype: torch.dtype | None
    """None for a storage of bytes."""


class TensorUnpickler(RestrictedUnpickler):
    """Admits plain tensors and parameters, and calls `make_tensor` for each."""

    def __init__(self, file: TorchFile) -> None:
        super().__init__(file.pickle(), encoding="utf-8")
        self._file = file

    def make_tensor(self, stored: StoredTensor) -> Any:
        """The result for a tensor. A subclass may read the values."""
        return stored

    def find_class(self, module: str, name: str) -> Any:
        """The class or function. Raises CheckpointError for names that a tensor does not need."""
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"):
            return getattr(self, name)
        if module in ("torch", "torch.storage") and name == "UntypedStorage":
            return _Storage
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a persistent id names."""
        if type(pid) is not tuple or len(pid) != 5 or type(pid[0]) is not str or pid[0] != "storage":
            raise ValueError("a persistent id that is not a storage")
        _, storage, key, _device, _size = pid
        dtype = None if storage is _Storage else storage
        if not isinstance(key, str) or not isinstance(dtype, torch.dtype | None):
            raise ValueError("a persistent id that is not a storage")
        return _Storage(key=key, dtype=dtype)

    def _rebuild_tensor_v2(
        self, storage: _Storage, offset: Any, size: Any, stride: Any, _grad: Any, hooks: Any, metadata: Any = None
    ) -> Any:
        return self._rebuild(storage, storage.dtype, offset, size, stride, hooks, metadata)

    def _rebuild_tensor_v3(
        self,
        storage: _Storage,
        offset: Any,
        size: Any,
        stride: Any,
        _grad: Any,
        hooks: Any,
        dtype: Any,
        meta: Any = None,
    ) -> Any:
        return self._rebuild(storage, dtype, offset, size, stride, hooks, meta)

    def _rebuild_parameter(self, data: Any, _requires_grad: Any, _hooks: Any) -> Any:
        return data

    def _rebuild(
        self, storage: _Storage, dtype: Any, offset: Any, size: Any, stride: Any, hooks: Any, metadata: Any
    ) -> Any:
        if hooks or metadata:
            raise ValueError("a tensor with hooks, or with bits for conjugation or sign")
        if not isinstance(dtype, torch.dtype) or storage.dtype not in (None, dtype):
            raise ValueError(f"a tensor of dtype {dtype!r} in a storage of {storage.dtype}")
        sizes, strides = tuple(size), tuple(stride)
        if not is_possible_shape(sizes, dtype) or len(sizes) != len(strides):
            raise ValueError(f"a tensor of shape {sizes[:64]} and strides {strides[:64]}")
        if not all(type(value) is int and 0 <= value < 2**63 for value in (offset, *strides)):
            raise ValueError(f"a tensor with strides {strides} from {offset} on")
        stored = StoredTensor(dtype=dtype, shape=sizes, strides=strides, key=storage.key, offset=offset)
        available = self._file.storage_size(storage.key) // dtype.itemsize
        if stored.offset + stored.span > available or math.prod(sizes) > available:
            raise ValueError(f"a tensor of shape {sizes} and strides {strides} in a storage of {available} values")
        # The strides of any view are fine, except those that spread a few values over much memory.
        if stored.span > 2 * math.prod(sizes) and not stored.is_contiguous:
            raise ValueError(f"a tensor of shape {sizes} and strides {strides}; save a contiguous tensor instead")
        return self.make_tensor(stored)
