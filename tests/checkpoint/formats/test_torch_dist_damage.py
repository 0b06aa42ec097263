"""`torch_dist` checkpoints that are damaged, or made to do harm."""

from __future__ import annotations

import enum
import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata

from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.errors import CheckpointError
from tests.checkpoint.support import change_metadata, write_torch_dist

_DATA = "__0_0.distcp"


class _Evil:
    def __init__(self, victim: Path) -> None:
        self._command = f"touch {victim}"

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


_FORMATS = metadata._MEM_FORMAT_ENCODING


class _OldPickler(pickle.Pickler):
    """Enumerations as Python 3.11.2 (Debian 12) pickles them."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_metadata_of_an_older_python_is_read(checkpoint: Path) -> None:
    before = TorchDistReader(checkpoint)
    content = pickle.loads((checkpoint / ".metadata").read_bytes())
    written = io.BytesIO()
    _OldPickler(written).dump(content)
    assert b"getattr" in written.getvalue()
    (checkpoint / ".metadata").write_bytes(written.getvalue())
    assert TorchDistReader(checkpoint).tensors == before.tensors


class _Attribute:
    def __init__(self, owner: Any, name: str) -> None:
        self._arguments = (owner, name)

    def __reduce__(self) -> Any:
        return getattr, self._arguments


class TestDamage:
    @pytest.mark.parametrize(
        ("owner", "name"), [(metadata.Metadata, "__init__"), (_FORMATS, "__init__"), (_FORMATS, "mro")]
    )
    def test_attributes_that_are_no_members_of_an_enumeration_are_refused(
        self, checkpoint: Path, owner: Any, name: str
    ) -> None:
        (checkpoint / ".metadata").write_bytes(pickle.dumps(_Attribute(owner, name)))
        with pytest.raises(CheckpointError, match=f"asks for '{name}' of .*, which no checkpoint needs"):
            TorchDistReader(checkpoint)

    def test_code_in_the_metadata_is_not_run(self, checkpoint: Path, tmp_path: Path) -> None:
        victim = tmp_path / "executed"
        evil = pickle.dumps(_Evil(victim))
        (checkpoint / ".metadata").write_bytes(evil)
        with pytest.raises(CheckpointError, match="system, which no checkpoint needs"):
            TorchDistReader(checkpoint)
        assert not victim.exists()
        pickle.loads(evil)
        assert victim.exists()  # it would have been

    def test_code_in_the_data_is_not_run(self, checkpoint: Path, tmp_path: Path) -> None:
        victim = tmp_path / "executed"
        blob = io.BytesIO()
        torch.save(_Evil(victim), blob)
        (checkpoint / _DATA).write_bytes(blob.getvalue())
        change_metadata(checkpoint, lambda m: _move(m, "f32", offset=0, length=len(blob.getvalue())))
        with pytest.raises(CheckpointError, match="data of 'f32' is damaged"):
            TorchDistReader(checkpoint).read("f32")
        assert not victim.exists()

    @pytest.mark.parametrize("keep", [0, 10, 200, -1])
    def test_truncated_metadata_is_refused(self, checkpoint: Path, keep: int) -> None:
        path = checkpoint / ".metadata"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
            TorchDistReader(checkpoint)

    def test_metadata_of_something_else_is_refused(self, checkpoint: Path) -> None:
        (checkpoint / ".metadata").write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(CheckpointError, match="holds a dict, not the metadata"):
            TorchDistReader(checkpoint)

    @pytest.mark.parametrize("keep", [0, 50, -1])
    def test_truncated_data_is_refused(self, tmp_path: Path, keep: int) -> None:
        directory = write_torch_dist(tmp_path / "checkpoint", {"a": torch.arange(100)})
        change_metadata(directory, lambda m: m.storage_data.pop(metadata.MetadataIndex("common_state/shard_0_1")))
        path = directory / _DATA
        length = pickle.loads((directory / ".metadata").read_bytes()).storage_data[_place("a", 1)].length
        path.write_bytes(path.read_bytes()[:length][:keep])
        with pytest.raises(CheckpointError, match=r"distcp: the data of 'a' is damaged"):
            TorchDistReader(directory).read("a")

    def test_a_missing_data_file_is_named(self, checkpoint: Path) -> None:
        (checkpoint / _DATA).unlink()
        with pytest.raises(CheckpointError, match=rf"data file '{_DATA}' of 'f32' is missing"):
            TorchDistReader(checkpoint).read("f32")

    def test_a_data_file_outside_of_the_directory_is_not_opened(self, checkpoint: Path) -> None:
        shutil.copy(checkpoint / _DATA, checkpoint.parent / _DATA)
        for path in (f"../{_DATA}", str(checkpoint.parent / _DATA)):
            change_metadata(checkpoint, lambda m, path=path: _move(m, "f32", relative_path=path))
            with pytest.raises(CheckpointError, match="of 'f32' is missing"):
                TorchDistReader(checkpoint).read("f32")

    def test_a_chunk_without_data_is_named(self, checkpoint: Path) -> None:
        change_metadata(checkpoint, lambda m: m.storage_data.pop(_place("f32", 2)))
        with pytest.raises(CheckpointError, match=r"no data for 'f32' at \(0, 0\)"):
            TorchDistReader(checkpoint).read("f32")

    def test_chunks_that_leave_a_hole_are_refused(self, checkpoint: Path) -> None:
        change_metadata(checkpoint, lambda m: m.state_dict_metadata["f32"].chunks.clear())
        with pytest.raises(CheckpointError, match="chunks of 'f32' do not make up"):
            TorchDistReader(checkpoint).read("f32")

    def test_data_of_another_dtype_than_promised_is_refused(self, checkpoint: Path) -> None:
        def promise(m: Any) -> None:
            m.state_dict_metadata["f32"].properties.dtype = torch.int32

        change_metadata(checkpoint, promise)
        with pytest.raises(CheckpointError, match=r"'f32' is not torch\.int32 \(3, 7\), as \.metadata says"):
            TorchDistReader(checkpoint).read("f32")

    def test_data_of_another_shape_than_promised_is_refused(self, checkpoint: Path) -> None:
        def promise(m: Any) -> None:
            one, other = _place("transposed", 2), _place("f32", 2)
            m.storage_data[one], m.storage_data[other] = m.storage_data[other], m.storage_data[one]

        change_metadata(checkpoint, promise)
        with pytest.raises(CheckpointError, match=r"'transposed' is not torch\.float32 \(4, 3\), as \.metadata says"):
            TorchDistReader(checkpoint).read("transposed")

    def test_chunks_that_lie_on_each_other_are_refused(self, checkpoint: Path) -> None:
        def repeat(m: Any) -> None:
            entry = m.state_dict_metadata["f32"]
            entry.size = torch.Size([6, 7])  # two chunks of three rows, both at row 0
            entry.chunks.append(entry.chunks[0])

        change_metadata(checkpoint, repeat)
        with pytest.raises(CheckpointError, match="chunks of 'f32'"):
            TorchDistReader(checkpoint).read("f32")

    def test_a_chunk_that_lies_outside_of_the_tensor_is_refused(self, checkpoint: Path) -> None:
        def shrink(m: Any) -> None:
            m.state_dict_metadata["f32"].size = torch.Size([2, 7])

        change_metadata(checkpoint, shrink)
        with pytest.raises(CheckpointError, match="'f32'"):
            TorchDistReader(checkpoint).read("f32")

    def test_chunks_in_the_same_bytes_are_refused(self, checkpoint: Path) -> None:
        def share(m: Any) -> None:
            m.storage_data[_place("transposed", 2)] = m.storage_data[_place("f32", 2)]

        change_metadata(checkpoint, share)
        with pytest.raises(CheckpointError, match=r"\.metadata.*'f32' and 'transposed' overlap"):
            TorchDistReader(checkpoint)

    @pytest.mark.parametrize("size", [(2**62, 2**62), (2**62, 4), (2**40, 2**40, 0)])
    def test_sizes_that_no_tensor_has_are_refused(self, checkpoint: Path, size: tuple[int, ...]) -> None:
        def lie(m: Any) -> None:
            entry = m.state_dict_metadata["f32"]
            entry.size = torch.Size(size)
            entry.chunks[:] = [metadata.ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))]

        change_metadata(checkpoint, lie)
        with pytest.raises(CheckpointError, match=r"\.metadata.*'f32' cannot have a chunk of shape"):
            TorchDistReader(checkpoint)

    @pytest.mark.parametrize("index", [(), (0,), (5,)])
    def test_more_values_than_there_are_bytes_are_refused_before_memory_is_reserved(
        self, checkpoint: Path, index: tuple[int, ...]
    ) -> None:
        def lie(m: Any) -> None:
            entry = m.state_dict_metadata["f32"]
            entry.size = torch.Size([2**30, 7])
            entry.chunks[0].sizes = torch.Size([2**30, 7])

        change_metadata(checkpoint, lie)
        with pytest.raises(CheckpointError, match=r"the data of 'f32' has \d+ bytes, expected at least 30064771072"):
            TorchDistReader(checkpoint).read("f32", index)

    def test_more_axes_than_can_be_checked_are_refused(self, checkpoint: Path) -> None:
        def lie(m: Any) -> None:
            entry = m.state_dict_metadata["f32"]
            entry.size = entry.chunks[0].sizes = entry.chunks[0].offsets = torch.Size([1] * 40)

        change_metadata(checkpoint, lie)
        with pytest.raises(CheckpointError, match="chunks of 'f32' do not make up"):
            TorchDistReader(checkpoint).read("f32")

    def test_a_place_beyond_the_end_of_the_file_is_refused(self, checkpoint: Path) -> None:
        change_metadata(checkpoint, lambda m: _move(m, "f32", offset=2**40))
        with pytest.raises(CheckpointError, match=r"distcp: the data of 'f32' is damaged: the file ends"):
            TorchDistReader(checkpoint).read("f32")

    @pytest.mark.parametrize(("field", "value"), [("offset", -1), ("length", -1), ("length", 1.5), ("offset", True)])
    def test_a_place_that_is_none_is_refused(self, checkpoint: Path, field: str, value: Any) -> None:
        change_metadata(checkpoint, lambda m: _move(m, "f32", **{field: value}))
        with pytest.raises(CheckpointError, match=r"\.metadata.*file, offset or length of 'f32' is invalid"):
            TorchDistReader(checkpoint)

    def test_data_that_torch_compressed_is_refused(self, checkpoint: Path) -> None:
        change_metadata(checkpoint, lambda m: _move(m, "f32", transform_descriptors=["zstd"]))
        with pytest.raises(CheckpointError, match="'f32' is compressed or encrypted"):
            TorchDistReader(checkpoint)

    def test_a_changed_value_is_noticed(self, checkpoint: Path) -> None:
        data = bytearray((checkpoint / _DATA).read_bytes())
        data[data.find(TorchDistReader(checkpoint).read("i64").numpy().tobytes())] ^= 1
        (checkpoint / _DATA).write_bytes(data)
        reader = TorchDistReader(checkpoint)
        for index in ((), (0,), (1, 2)):
            with pytest.raises(CheckpointError, match="the data of 'i64' is damaged: ValueError: the checksum"):
                reader.read("i64", index)
        reader.read("f32")

    @pytest.mark.parametrize("field", ["size", "chunks", "properties"])
    def test_metadata_that_lacks_a_field_is_refused(self, checkpoint: Path, field: str) -> None:
        change_metadata(checkpoint, lambda m: delattr(m.state_dict_metadata["f32"], field))
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            TorchDistReader(checkpoint).read("f32")


def _place(name: str, dim: int) -> metadata.MetadataIndex:
    return metadata.MetadataIndex(name, torch.Size([0] * dim))


def _move(content: Any, name: str, **fields: Any) -> None:
    for field, value in fields.items():
        setattr(content.storage_data[_place(name, 2)], field, value)
