"""What torch.save writes, read without torch.load, which is the witness."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_fp32.checkpoint.formats.common_state import Opaque, read_common_state
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.formats.torch_dist_writer import TorchDistWriter
from megatron_fp32.checkpoint.formats.torch_file import open_torch_file
from megatron_fp32.errors import CheckpointError
from tests.checkpoint.support import bits
from tests.support import in_a_child


def _save(path: Path, value: Any, before: bytes = b"") -> Path:
    blob = io.BytesIO()
    torch.save(value, blob)
    path.write_bytes(before + blob.getvalue())
    return path


def _save_without_checksums(path: Path, value: Any) -> Path:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return _save(path, value)
    finally:
        torch.serialization.set_crc32_options(before)


def _read(path: Path, index: tuple[int, ...] = (), offset: int = 0) -> Tensor:
    with open_torch_file(path, "the data", offset) as file:
        stored = file.tensor()
        target = torch.empty(stored.shape[len(index) :], dtype=stored.dtype)
        file.read_into(stored, index, target)
    return target


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).squeeze(-1)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", [b"", b"another blob"], ids=["alone", "behind another"])
def test_every_dtype_is_read(tmp_path: Path, dtype: torch.dtype, before: bytes) -> None:
    value = _random(dtype, 3, 5)
    read = _read(_save(tmp_path / "f", value, before), offset=len(before))
    assert (read.dtype, read.shape) == (value.dtype, value.shape)
    assert torch.equal(bits(read), bits(value))


_BASE = torch.arange(120.0)
VIEWS: dict[str, Callable[[], Tensor]] = {
    "a part of a larger storage": lambda: _BASE[17:41].view(4, 6),
    "transposed": lambda: _BASE.view(4, 5, 6).transpose(0, 2),
    "permuted": lambda: _BASE.view(4, 5, 6).permute(2, 0, 1),
    "every second row": lambda: _BASE.view(20, 6)[::2],
    "channels last": lambda: _BASE.view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "no elements": lambda: torch.empty(0, 3),
    "a scalar": lambda: _BASE[3],
    "sizes of one with odd strides": lambda: _BASE.as_strided((1, 6, 1), (50, 1, 7)),
    "a parameter": lambda: nn.Parameter(_BASE.view(10, 12).clone()),
    "requires grad": lambda: _BASE.view(10, 12).clone().requires_grad_(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_is_read(tmp_path: Path, name: str) -> None:
    value = VIEWS[name]()
    path = _save(tmp_path / "f", value)
    read = _read(path)
    assert torch.equal(read, torch.load(path, weights_only=True))
    assert not read.requires_grad
    if value.dim() and value.numel():
        assert torch.equal(_read(path, (0,)), value[0])
        assert torch.equal(_read(path, (value.shape[0] - 1,)), value[-1])


class _Subclass(Tensor):
    pass


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "_rebuild_sparse_tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "which no checkpoint needs"),
    "a subclass": (lambda: torch.ones(3).as_subclass(_Subclass), "_rebuild_from_type_v2"),
    "conjugated": (lambda: torch.ones(3, dtype=torch.complex64).conj(), "bits for conjugation or sign"),
    "negated": (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "bits for conjugation or sign"),
    "expanded": (lambda: torch.ones(1).expand(4), "in a storage of 1 values"),
    "few values far apart": (lambda: torch.ones(1000)[::100], "save a contiguous tensor instead"),
    "on the meta device": (lambda: torch.ones(3, device="meta"), "which no checkpoint needs"),
    "a list": (lambda: [torch.ones(3)], "it is a list, not a tensor"),
    "a class": (lambda: Namespace(), "argparse.Namespace, which no checkpoint needs"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_tensor_is_named(tmp_path: Path, name: str) -> None:
    make, message = ODD[name]
    path = _save(tmp_path / "f", make())
    with pytest.raises(CheckpointError, match=message) as caught:
        _read(path)
    assert str(caught.value).startswith(f"{path}: the data is damaged: ")


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return _save(tmp_path / "f", torch.arange(1000.0))

    @pytest.mark.parametrize("index", [(), (5,), (999,)])
    def test_a_changed_value_is_noticed(self, path: Path, index: tuple[int, ...]) -> None:
        content = bytearray(path.read_bytes())
        content[content.find(torch.arange(1000.0).numpy().tobytes()) + 21] ^= 1
        path.write_bytes(content)
        torch.load(path, weights_only=True)  # does not look
        with pytest.raises(CheckpointError, match=r"the checksum of '.*/data/0' is"):
            _read(path, index)

    def test_values_without_checksums_are_read(self, tmp_path: Path) -> None:
        path = _save_without_checksums(tmp_path / "f", torch.arange(1000.0))
        assert torch.equal(_read(path), torch.arange(1000.0))
        assert torch.equal(_read(path, (7,)), torch.tensor(7.0))

    def test_values_without_checksums_that_begin_elsewhere_are_refused(self, tmp_path: Path) -> None:
        path = _save_without_checksums(tmp_path / "f", torch.arange(1000.0))
        content = bytearray(path.read_bytes())
        header = content.rfind(b"PK\3\4", 0, content.find(torch.arange(1000.0).numpy().tobytes()))
        content[header + 28] -= 4  # length of the extra field
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="data/0' does not end where another begins"):
            _read(path)

    def _rewrite(self, path: Path, change: Callable[[str, bytes], bytes], **options: Any) -> None:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, content in members.items():
                archive.writestr(name, change(name.split("/", 1)[1], content))

    def test_compressed_members_are_refused(self, path: Path) -> None:
        self._rewrite(path, lambda name, content: content, compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointError, match="is compressed or encrypted"):
            _read(path)

    def test_big_endian_values_are_refused(self, path: Path) -> None:
        self._rewrite(path, lambda name, content: b"big" if name == "byteorder" else content)
        with pytest.raises(CheckpointError, match="not in little-endian order"):
            _read(path)

    def test_a_storage_that_is_too_small_is_refused(self, path: Path) -> None:
        self._rewrite(path, lambda name, content: content[:-4] if name == "data/0" else content)
        with pytest.raises(CheckpointError, match=r"shape \(1000,\).*in a storage of 999 values"):
            _read(path)

    def test_a_member_twice_is_refused(self, path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data/0"))
            archive.writestr(name, bytes(4000))
        with pytest.raises(CheckpointError, match="two members have one name"):
            _read(path)

    @pytest.mark.parametrize("shape", [(-1,), (2**63,), (2**40, 2**40), (True,), ("a",), (1.0,), (1,) * 65])
    @pytest.mark.parametrize("strides", ["ones", "large"])
    def test_impossible_shapes_are_refused_before_memory_is_reserved(
        self, path: Path, shape: tuple[Any, ...], strides: str
    ) -> None:
        def lie(name: str, content: bytes) -> bytes:
            return (
                _tensor_pickle(shape, (2**62 if strides == "large" else 1,) * len(shape))
                if name == "data.pkl"
                else content
            )

        self._rewrite(path, lie)
        with pytest.raises(CheckpointError, match="is damaged"):
            _read(path)

    def test_a_pickle_that_wants_memory_gets_none(self, path: Path) -> None:
        for bomb in (
            pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 1) + pickle.STOP,
            pickle.BYTEARRAY8 + struct.pack("<Q", 2**40),
            pickle.BINBYTES8 + struct.pack("<Q", 2**40),
            pickle.BINUNICODE8 + struct.pack("<Q", 2**62),
        ):
            self._rewrite(path, lambda name, content, bomb=bomb: bomb if name == "data.pkl" else content)
            assert "is damaged" in in_a_child(_refusal, path, memory=2 * 10**9)

    def test_a_state_for_a_class_is_refused(self, path: Path) -> None:
        poison = b"ccollections\nOrderedDict\n(N}X\x01\x00\x00\x00aK\x01stb."
        self._rewrite(path, lambda name, content: poison if name == "data.pkl" else content)
        with pytest.raises(CheckpointError, match="it sets the state of <class 'collections"):
            _read(path)


def _tensor_pickle(shape: tuple[Any, ...], strides: tuple[int, ...]) -> bytes:
    class Storage:
        pass

    class Made:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, shape, strides, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 1000) if isinstance(obj, Storage) else None

    written = io.BytesIO()
    Pickler(written, protocol=2).dump(Made())
    return written.getvalue()


def _refusal(path: Path) -> str:
    """With which message a file is refused."""
    try:
        with open_torch_file(path, "the data") as file:
            file.tensor()
    except CheckpointError as error:
        return str(error)
    return "it was read"


class TestCommonState:
    def _reader(self, directory: Path, common: dict[str, Any]) -> TorchDistReader:
        with TorchDistWriter(directory) as writer:
            writer.write("a", torch.ones(3))
            writer.finish({})
        torch.save(common, directory / "common.pt")
        return TorchDistReader(directory)

    def test_plain_values_come_as_they_are(self, tmp_path: Path) -> None:
        plain = {
            "args": Namespace(a=1, b=[None, True, 2.5, "text"], dtype=torch.bfloat16, space=SimpleNamespace(x=1)),
            "signal": signal.SIGTERM,
            "set": {1, 2},
            "bytes": b"\xff\x00",
            "ordered": OrderedDict(a=1),
            "size": torch.Size([1, 2]),
            "device": torch.device("cpu"),
        }
        assert read_common_state(self._reader(tmp_path, plain)) == plain

    def test_numbers_paths_and_tensors(self, tmp_path: Path) -> None:
        numbers = {name: np.dtype(name).type(1) for name in ("f2", "f4", "f8", "i1", "i8", "u4", "?")}
        tensors = {"t": torch.arange(6).view(2, 3).t(), "p": nn.Parameter(torch.ones(2))}
        common = {**numbers, **tensors, "path": Path("/a/b")}
        found = read_common_state(self._reader(tmp_path, common))
        assert {name: found[name] for name in numbers} == numbers
        assert all(type(found[name]) is type(number) for name, number in numbers.items())
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert found["path"] == PurePosixPath("/a/b")

    def test_other_classes_stand_for_themselves_and_run_nothing(self, tmp_path: Path) -> None:
        victim = tmp_path / "executed"
        common = {
            "evil": _Evil(f"touch {victim}"),
            "format": json.JSONDecodeError,
            "counts": defaultdict(list, a=[1]),
            "custom": _Custom(7),
        }
        (tmp_path / "checkpoint").mkdir()
        found = read_common_state(self._reader(tmp_path / "checkpoint", common))
        assert not victim.exists()
        assert isinstance(found["evil"], Opaque)
        assert found["evil"].arguments == (f"touch {victim}",)
        assert repr(found["evil"]).startswith("<posix.system")
        assert issubclass(found["format"], Opaque)
        assert found["counts"].items == [("a", [1])]
        assert found["custom"].state == {"value": 7}
        assert not callable(found["custom"])

    def test_it_may_be_missing(self, tmp_path: Path) -> None:
        reader = self._reader(tmp_path, {})
        (tmp_path / "common.pt").unlink()
        assert read_common_state(reader) == {}  # what the object holds
        reader.objects.remove("common_state/shard_0_1")
        with pytest.raises(CheckpointError, match=r"has neither common\.pt nor the object 'common_state"):
            read_common_state(reader)

    @pytest.mark.parametrize("value", [[], {1: 2}, None, torch.ones(3)])
    def test_something_else_is_refused(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(CheckpointError, match=r"common\.pt: the common state must be a dictionary with text keys"):
            read_common_state(self._reader(tmp_path, value))

    def test_tensors_cannot_take_more_than_the_file(self, tmp_path: Path) -> None:
        storage = torch.ones(1000)
        views = {str(i): storage.view(10, 100) for i in range(100)}
        with pytest.raises(CheckpointError, match="its tensors are larger than the file"):
            read_common_state(self._reader(tmp_path, views))


class _Evil:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


class _Custom:
    def __init__(self, value: int) -> None:
        self.value = value
