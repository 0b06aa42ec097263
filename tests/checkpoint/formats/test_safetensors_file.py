"""The strict reader of one safetensors file; the safetensors package is the witness of what is valid."""

from __future__ import annotations

import concurrent.futures
import io
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fp32.checkpoint.formats import section
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.safetensors_file import HEADER_LIMIT, read_header, read_tensor
from megatron_fp32.errors import CheckpointError
from tests.checkpoint.support import bits

A, B = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, {"dtype": "I8", "shape": [3], "data_offsets": [8, 11]}


def _write(path: Path, header: Any, data: bytes = bytes(11)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


class TestAccepts:
    def test_tensors_in_any_order_and_at_odd_places(self, tmp_path: Path) -> None:
        odd = {"b": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
               "a": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]}}  # fmt: skip
        values = torch.tensor([1.5, -2.25])
        path = _write(tmp_path / "f", {"a": odd["a"], "b": odd["b"]}, bytes([1, 2, 3]) + values.numpy().tobytes())
        header = read_header(path)
        assert torch.equal(read_tensor(header, "a"), values)
        assert torch.equal(read_tensor(header, "b"), torch.tensor([1, 2, 3], dtype=torch.int8))

    def test_an_empty_tensor_anywhere_a_scalar_and_metadata(self, tmp_path: Path) -> None:
        header = {
            "__metadata__": {"format": "pt"},
            "none": {"dtype": "F32", "shape": [0, 7], "data_offsets": [8, 8]},
            "a": {**A, "shape": [2, 1]},
            "b": {"dtype": "F16", "shape": [], "data_offsets": [8, 10]},
        }
        path = _write(tmp_path / "f", header, bytes(10))
        found = read_header(path)
        assert found.metadata == {"format": "pt"}
        assert {name: tensor.shape for name, tensor in load_file(path).items()} == {
            name: info.shape for name, info in found.tensors.items()
        }
        assert {name: read_tensor(found, name).shape for name in found.tensors} == {
            "none": (0, 7), "a": (2, 1), "b": ()
        }  # fmt: skip

    def test_spaces_after_the_header(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "f", json.dumps({"a": A, "b": B}).encode() + b"   ")
        assert read_header(path).tensors.keys() == {"a", "b"}

    @pytest.mark.parametrize(
        ("header", "data"),
        [
            (b"\t\n{}\r ", 0),
            (b' {"a":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}', 1),
            ({"__metadata__": None, "a": A}, 8),
            ({"a": {**A, "extra": 1}}, 8),
            ({"none": {"dtype": "F4", "shape": [0, 6], "data_offsets": [8, 8]}, "a": A}, 8),
            ({}, 0),
        ],
    )
    def test_what_the_safetensors_package_reads(self, header: Any, data: int, tmp_path: Path) -> None:
        path = _write(tmp_path / "f", header, bytes(data))
        theirs, ours = load_file(path), read_header(path)
        assert {name: info.torch_shape for name, info in ours.tensors.items()} == {
            name: tensor.shape for name, tensor in theirs.items()
        }
        for name, tensor in theirs.items():
            assert torch.equal(bits(read_tensor(ours, name)), bits(tensor))


class TestRefuses:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dtype": 3}, "dtype of tensor 'a' is not a text"),
            ({"dtype": None}, "dtype of tensor 'a' is not a text"),
            ({"dtype": "F31"}, "'a' has the dtype F31, which torch does not have"),
            ({"shape": 2}, "'a' cannot have the shape 2"),
            ({"shape": [True, 2]}, r"'a' cannot have the shape \[True, 2\]"),
            ({"shape": [2.0]}, r"'a' cannot have the shape \[2.0\]"),
            ({"shape": [-1, -2]}, r"'a' cannot have the shape \[-1, -2\]"),
            ({"shape": ["2"]}, "'a' cannot have the shape"),
            ({"shape": [2**62, 4, 2]}, "'a' cannot have the shape"),  # 2**67 bytes, 8 modulo 2**64 with one more
            ({"shape": [2**63, 0], "data_offsets": [0, 0]}, "'a' cannot have the shape"),
            ({"shape": [3]}, r"'a' needs 12 bytes, but its data_offsets are \[0, 8\]"),
            ({"data_offsets": [8, 0]}, "'a' needs 8 bytes"),
            ({"data_offsets": [-8, 0]}, "'a' needs 8 bytes"),
            ({"data_offsets": [0, 8, 8]}, "data_offsets of tensor 'a' are not two integers"),
            ({"data_offsets": [False, 8]}, "data_offsets of tensor 'a' are not two integers"),
            ({"data_offsets": [0.0, 8]}, "data_offsets of tensor 'a' are not two integers"),
            ({"data_offsets": None}, "data_offsets of tensor 'a' are not two integers"),
            ({"data_offsets": [1, 9]}, "'a' starts at byte 1 of the data and leaves a hole"),
            ({"dtype": "F4", "shape": [2, 3]}, "'a' of F4 has an odd last axis"),
            ({"dtype": "F4", "shape": []}, "'a' of F4 has an odd last axis"),
            ({"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}, "'a' has the dtype F6_E2M3, which torch does"),
        ],
    )
    def test_an_entry(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        path = _write(tmp_path / "f", {"a": {**A, **change}, "b": B})
        with pytest.raises(CheckpointError, match=message) as caught:
            read_header(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize(
        ("header", "data", "message"),
        [
            ({"a": A, "b": {**B, "data_offsets": [7, 10]}}, 10, "'b' starts at byte 7 of the data and overlaps"),
            ({"a": A, "b": {**B, "data_offsets": [9, 12]}}, 12, "'b' starts at byte 9 of the data and leaves a hole"),
            ({"a": A, "b": B}, 12, "take 11 bytes, but the file has 12"),
            ({"a": A, "b": B}, 10, "take 11 bytes, but the file has 10"),
            ({"a": A, "b": []}, 11, "'b' must be described by"),
            ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' must be described by"),
            ({"__metadata__": {"a": 1}}, 0, "__metadata__ must be an object whose values are text"),
            ({"__metadata__": []}, 0, "__metadata__ must be an object whose values are text"),
            (b'{"a":1,"a":2}', 0, "it has the key 'a' twice"),
            (b'{"a":{"dtype":"I8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1, "it has the key 'dtype' twice"),
            (b'{"\\ud800":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}', 1, "surrogates not allowed"),
            (b"[]", 0, "not a JSON object"),
            (b"null", 0, "not a JSON object"),
            (b"\xef\xbb\xbf{}", 0, "is not a readable safetensors file"),
            (b"\x0b{}", 0, "Expecting value"),
            (b"{}\0", 0, "Extra data"),
            (b'{"a":' + b"[" * 100_000, 0, "nested too deeply|Expecting"),
            (b'{"a":' + b"9" * 5000 + b"}", 0, "is not a readable safetensors file"),
            (b'{"\xff":1}', 0, "is not a readable safetensors file"),
            (b"{}{}", 0, "Extra data"),
            (b"", 0, "Expecting value"),
        ],
    )
    def test_a_header(self, tmp_path: Path, header: Any, data: int, message: str) -> None:
        path = _write(tmp_path / "f", header, bytes(data))
        with pytest.raises(CheckpointError, match=message) as caught:
            read_header(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("length", [12, HEADER_LIMIT + 1, 2**63, 2**64 - 1])
    def test_a_length_that_lies(self, tmp_path: Path, length: int) -> None:
        path = tmp_path / "f"
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match=f"header should have {length} bytes, but the file has 10"):
            read_header(path)

    def test_a_directory_and_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "absent"):
            with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
                read_header(path)


class TestReading:
    @pytest.fixture
    def whole(self) -> Tensor:
        return torch.randint(0, 256, (3, 4, 5, 2), dtype=torch.uint8).view(torch.bfloat16)[..., 0]

    @pytest.fixture
    def path(self, tmp_path: Path, whole: Tensor) -> Path:
        save_file({"first": torch.ones(3), "whole": whole.contiguous()}, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    @pytest.mark.parametrize("index", [(), (0,), (2,), (1, 3), (2, 0, 4), (0, 0, 0)])
    def test_a_part_is_read_and_nothing_else(
        self, path: Path, whole: Tensor, index: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        header, part = read_header(path), whole[index]
        counts: list[int] = []
        opened = Path.open

        def count(self: Path, *args: Any, **kwargs: Any) -> Any:
            file = opened(self, *args, **kwargs)
            return _Counting(file, counts)

        monkeypatch.setattr(Path, "open", count)
        read = read_tensor(header, "whole", index)
        assert (read.dtype, read.shape) == (part.dtype, part.shape)
        assert torch.equal(bits(read), bits(part))
        assert sum(counts) == part.nbytes

    @pytest.mark.parametrize("index", [(3,), (-1,), (0, 4), (0, 0, 0, 0)])
    def test_a_part_that_is_not_there_is_an_error(self, path: Path, index: tuple[int, ...]) -> None:
        with pytest.raises(IndexError, match="does not have the index"):
            read_tensor(read_header(path), "whole", index)

    def test_reads_of_a_byte_at_a_time_give_the_same(
        self, path: Path, whole: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda *args, **kwargs: _Slow(opened(*args, **kwargs)))
        assert torch.equal(bits(read_tensor(read_header(path), "whole")), bits(whole))

    def test_a_file_that_ends_early_is_an_error(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        header = read_header(path)
        with path.open("rb", buffering=0) as file, pytest.raises(EOFError, match="ends 90 bytes early"):
            section.read_into(file, path.stat().st_size - 10, torch.empty(100, dtype=torch.uint8))
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'whole'.*changed since its header"):
            read_tensor(header, "whole")

    def test_another_file_in_its_place_is_an_error(self, path: Path) -> None:
        header, other = read_header(path), path.with_name("other")
        other.write_bytes(path.read_bytes())
        other.replace(path)
        with pytest.raises(CheckpointError, match="has changed since its header was read"):
            read_tensor(header, "whole")

    def test_a_tensor_is_the_callers_own(self, path: Path, whole: Tensor) -> None:
        with HuggingFaceReader(path.parent) as reader:
            reader.read("whole").zero_()
            assert torch.equal(bits(reader.read("whole")), bits(whole))

    def test_threads_and_processes_read_from_one_reader(self, path: Path, whole: Tensor) -> None:
        with HuggingFaceReader(path.parent) as reader:
            with concurrent.futures.ThreadPoolExecutor(8) as threads:
                read = list(threads.map(lambda i: reader.read("whole", (i % 3,)), range(300)))
            assert all(torch.equal(bits(tensor), bits(whole[i % 3])) for i, tensor in enumerate(read))
            with multiprocessing.get_context("spawn").Pool(1) as processes:
                (content,) = processes.map(_read_whole, [reader])
        assert content == bytes(bits(whole))

    def test_the_result_is_the_same_through_a_link(self, path: Path, whole: Tensor, tmp_path: Path) -> None:
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "model.safetensors").symlink_to(path)  # as the Hugging Face cache does
        with HuggingFaceReader(tmp_path / "linked") as reader:
            assert torch.equal(bits(reader.read("whole")), bits(whole))


def _read_whole(reader: HuggingFaceReader) -> bytes:
    return bytes(bits(reader.read("whole")))


class _Counting(io.RawIOBase):
    def __init__(self, file: Any, counts: list[int]) -> None:
        self.file, self.counts = file, counts

    def fileno(self) -> int:
        return int(self.file.fileno())

    def seek(self, *args: int) -> int:
        return int(self.file.seek(*args))

    def readinto(self, memory: Any) -> int:
        count = int(self.file.readinto(memory))
        self.counts.append(count)
        return count


class _Slow(_Counting):
    def __init__(self, file: Any) -> None:
        super().__init__(file, [])

    def readinto(self, memory: Any) -> int:
        return super().readinto(memory[:1])
