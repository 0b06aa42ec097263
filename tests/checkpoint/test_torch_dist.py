from __future__ import annotations

import enum
import io
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor
from torch.distributed.checkpoint import metadata

from megatron_fp32.checkpoint.huggingface import CheckpointError
from megatron_fp32.checkpoint.torch_dist import TRACKER, TorchDistReader, find_checkpoint
from megatron_fp32.checkpoint.torch_dist_writer import TorchDistWriter, common_state
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from tests.checkpoint.support import bits

_DATA = "__0_0.distcp"


def _tensors() -> dict[str, Tensor]:
    random = {
        "f32": torch.randint(0, 256, (3, 7, 4), dtype=torch.uint8).view(torch.float32).squeeze(-1),
        "bf16": torch.randint(0, 256, (5, 2), dtype=torch.uint8).view(torch.bfloat16),
        "fp8": torch.randint(0, 256, (9,), dtype=torch.uint8).view(torch.float8_e4m3fn),
        "i64": torch.randint(-(2**40), 2**40, (2, 3)),
    }
    return {**random, "transposed": torch.arange(12.0).reshape(3, 4).t(), "scalar": torch.tensor(1.5)}


def _write(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    with TorchDistWriter(directory) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.write_object("module._extra_state/shard_0_1", torch.empty(0, dtype=torch.uint8))
        writer.finish({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}})
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return _write(tmp_path / "checkpoint", _tensors())


def _change_metadata(directory: Path, change: Callable[[Any], object]) -> None:
    path = directory / ".metadata"
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def _wanted_by_megatron(tensors: dict[str, Tensor]) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, torch.zeros(t.shape, dtype=t.dtype)) for name, t in tensors.items()
    }
    wanted["object"] = ShardedObject("module._extra_state", None, (1,), (0,))
    return wanted


class TestWriter:
    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("strict", ["assume_ok_unexpected", "raise_unexpected"])
    def test_megatron_loads_every_bit(self, tmp_path: Path, strict: str) -> None:
        tensors = _tensors()
        directory = _write(tmp_path / "checkpoint", tensors)
        loaded = dist_checkpointing.load(_wanted_by_megatron(tensors), str(directory), strict=strict)
        assert all(_same(loaded[name], tensor) for name, tensor in tensors.items())
        assert loaded["object"].numel() == 0

    @pytest.mark.usefixtures("megatron")
    def test_megatron_finds_nothing_else_in_it(self, checkpoint: Path) -> None:
        try:
            dist_checkpointing.load(_wanted_by_megatron(_tensors()), str(checkpoint), strict="raise_all")
        except CheckpointingException as error:
            # Releases that read common.pt do not know the object that later ones keep the same in.
            assert str(error).rstrip().endswith("Missing keys (for all ranks): {'common_state'}.")  # noqa: PT017

    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("strict", ["raise_unexpected", "raise_all"])
    def test_megatron_misses_what_is_not_in_it(self, checkpoint: Path, strict: str) -> None:
        wanted = _wanted_by_megatron({**_tensors(), "absent": torch.zeros(1)})
        with pytest.raises(CheckpointingException, match="absent"):
            dist_checkpointing.load(wanted, str(checkpoint), strict=strict)

    @pytest.mark.usefixtures("megatron")
    def test_megatron_reads_the_common_state(self, tmp_path: Path) -> None:
        with TorchDistWriter(tmp_path) as writer:
            writer.finish(common_state(Namespace(num_layers=7)))
        state = dist_checkpointing.load_common_state_dict(str(tmp_path))
        assert state["args"].num_layers == 7
        assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)

    def test_torch_loads_every_bit(self, tmp_path: Path) -> None:
        tensors = _tensors()
        directory = _write(tmp_path / "checkpoint", tensors)
        state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
        assert all(_same(state[name], tensor) for name, tensor in tensors.items())

    def test_objects_are_lists_of_one(self, checkpoint: Path) -> None:
        content = pickle.loads((checkpoint / ".metadata").read_bytes())
        objects = [n for n, e in content.state_dict_metadata.items() if isinstance(e, metadata.BytesStorageMetadata)]
        assert sorted(objects) == ["common_state/shard_0_1", "module._extra_state/shard_0_1"]
        for name in objects:
            where = content.storage_data[metadata.MetadataIndex(name)]
            blob = (checkpoint / where.relative_path).read_bytes()[where.offset : where.offset + where.length]
            value = torch.load(io.BytesIO(blob), weights_only=True)
            assert isinstance(value, list), name
            assert len(value) == 1, name

    def test_a_slice_takes_no_more_room_than_its_values(self, tmp_path: Path) -> None:
        whole = torch.zeros(1_000_000)
        _write(tmp_path / "checkpoint", {"slice": whole[:10]})
        assert (tmp_path / "checkpoint" / _DATA).stat().st_size < 100_000

    def test_a_directory_that_holds_data_is_not_written_over(self, checkpoint: Path) -> None:
        with pytest.raises(FileExistsError):
            TorchDistWriter(checkpoint)


def _save(directory: str) -> dict[str, Tensor]:
    """Save a tensor sharded by rows, one by columns and one replicated; what this rank holds of them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    held = {
        "rows": torch.randn(3, 5, generator=generator),
        "columns": torch.randn(4, 3, generator=generator).bfloat16(),
        "replicated": torch.arange(6.0),
    }
    state = {
        "rows": ShardedTensor.from_rank_offsets("rows", held["rows"], (0, rank, size)),
        "columns": ShardedTensor.from_rank_offsets("columns", held["columns"], (1, rank, size)),
        "replicated": ShardedTensor.from_rank_offsets("replicated", held["replicated"], replica_id=rank),
    }
    dist_checkpointing.save(state, directory)
    return held


def _save_tensor_parallel(directory: str) -> dict[str, Tensor]:
    with model_parallel(tensor=2):
        return _save(directory)


class TestReader:
    @pytest.mark.usefixtures("megatron")
    def test_it_reads_what_one_rank_saved(self, tmp_path: Path) -> None:
        held = _save(str(tmp_path))
        reader = TorchDistReader(tmp_path)
        assert reader.tensors.keys() == held.keys()
        assert all(_same(reader.read(name), tensor) for name, tensor in held.items())

    def test_it_puts_together_what_two_ranks_saved(self, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
        first, second = ranks(2).run(_save_tensor_parallel, str(tmp_path))
        reader = TorchDistReader(tmp_path)
        assert _same(reader.read("rows"), torch.cat([first["rows"], second["rows"]]))
        assert _same(reader.read("columns"), torch.cat([first["columns"], second["columns"]], dim=1))
        assert _same(reader.read("replicated"), first["replicated"])

    def test_it_reads_what_torch_saved(self, tmp_path: Path) -> None:
        tensors = _tensors()
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
        reader = TorchDistReader(tmp_path)
        assert {n: (i.dtype, i.shape) for n, i in reader.tensors.items()} == {
            n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
        }
        assert all(_same(reader.read(name), tensor) for name, tensor in tensors.items())

    @pytest.mark.parametrize("index", [(3,), (-1,), (0, 7), (0, 0, 0)])
    def test_a_part_that_is_not_there_is_an_error(self, checkpoint: Path, index: tuple[int, ...]) -> None:
        with pytest.raises(IndexError, match="has no part at"):
            TorchDistReader(checkpoint).read("f32", index)

    def test_a_reader_can_be_sent_to_another_process(self, checkpoint: Path) -> None:
        reader = TorchDistReader(checkpoint)
        sent = pickle.loads(pickle.dumps(reader))
        assert all(_same(sent.read(name), reader.read(name)) for name in reader.tensors)

    def test_objects_are_no_tensors(self, checkpoint: Path) -> None:
        reader = TorchDistReader(checkpoint)
        assert sorted(reader.objects) == ["common_state/shard_0_1", "module._extra_state/shard_0_1"]
        with pytest.raises(CheckpointError, match=r"common_state/shard_0_1' is no tensor"):
            reader.read("common_state/shard_0_1")

    def test_neither_writing_nor_reading_needs_megatron(self, tmp_path: Path) -> None:
        script = (
            "import sys, torch\n"
            "sys.modules['megatron'] = None\n"
            "from megatron_fp32.checkpoint import convert, torch_dist, torch_dist_writer\n"
            "with torch_dist_writer.TorchDistWriter(sys.argv[1]) as writer:\n"
            "    writer.write('a', torch.arange(3))\n"
            "    writer.finish({})\n"
            "assert torch_dist.TorchDistReader(sys.argv[1]).read('a').tolist() == [0, 1, 2]\n"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr


class TestTracker:
    @pytest.mark.parametrize(
        ("text", "name"),
        [("release", "release"), ("release\n", "release"), ("12", "iter_0000012"), ("0", "iter_0000000")],
    )
    def test_it_names_the_checkpoint(self, checkpoint: Path, text: str, name: str) -> None:
        checkpoint.rename(checkpoint.parent / name)
        (checkpoint.parent / TRACKER).write_text(text)
        assert find_checkpoint(checkpoint.parent) == checkpoint.parent / name

    @pytest.mark.parametrize("text", ["", "latest", "-1", "1.5", "../../etc", "release/../x"])
    def test_garbage_in_it_is_refused(self, checkpoint: Path, text: str) -> None:
        (checkpoint.parent / TRACKER).write_text(text)
        with pytest.raises(CheckpointError, match="must hold 'release' or an iteration"):
            find_checkpoint(checkpoint.parent)

    def test_a_checkpoint_that_it_names_must_exist(self, tmp_path: Path) -> None:
        (tmp_path / TRACKER).write_text("5")
        with pytest.raises(CheckpointError, match=r"no \.metadata in .*iter_0000005"):
            find_checkpoint(tmp_path)

    def test_a_directory_without_it_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is no torch_dist checkpoint"):
            find_checkpoint(tmp_path)

    def test_another_backend_is_refused(self, checkpoint: Path) -> None:
        (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr"}')
        with pytest.raises(CheckpointError, match="expected sharded_backend 'torch_dist', got 'zarr'"):
            find_checkpoint(checkpoint)

    @pytest.mark.parametrize("text", ["{", "[]", "null"])
    def test_a_damaged_declaration_is_refused(self, checkpoint: Path, text: str) -> None:
        (checkpoint / "metadata.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"metadata\.json"):
            find_checkpoint(checkpoint)


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
        _change_metadata(checkpoint, lambda m: _move(m, "f32", offset=0, length=len(blob.getvalue())))
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
        directory = _write(tmp_path / "checkpoint", {"a": torch.arange(100)})
        _change_metadata(directory, lambda m: m.storage_data.pop(metadata.MetadataIndex("common_state/shard_0_1")))
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
            _change_metadata(checkpoint, lambda m, path=path: _move(m, "f32", relative_path=path))
            with pytest.raises(CheckpointError, match="of 'f32' is missing"):
                TorchDistReader(checkpoint).read("f32")

    def test_a_chunk_without_data_is_named(self, checkpoint: Path) -> None:
        _change_metadata(checkpoint, lambda m: m.storage_data.pop(_place("f32", 2)))
        with pytest.raises(CheckpointError, match=r"no data for 'f32' at \(0, 0\)"):
            TorchDistReader(checkpoint).read("f32")

    def test_chunks_that_leave_a_hole_are_refused(self, checkpoint: Path) -> None:
        _change_metadata(checkpoint, lambda m: m.state_dict_metadata["f32"].chunks.clear())
        with pytest.raises(CheckpointError, match="chunks of 'f32' do not make up"):
            TorchDistReader(checkpoint).read("f32")

    def test_data_of_another_dtype_than_promised_is_refused(self, checkpoint: Path) -> None:
        def promise(m: Any) -> None:
            m.state_dict_metadata["f32"].properties.dtype = torch.int32

        _change_metadata(checkpoint, promise)
        with pytest.raises(CheckpointError, match=r"'f32' is not the torch\.int32 \(3, 7\) promised"):
            TorchDistReader(checkpoint).read("f32")

    def test_data_of_another_shape_than_promised_is_refused(self, checkpoint: Path) -> None:
        def promise(m: Any) -> None:
            one, other = _place("transposed", 2), _place("f32", 2)
            m.storage_data[one], m.storage_data[other] = m.storage_data[other], m.storage_data[one]

        _change_metadata(checkpoint, promise)
        with pytest.raises(CheckpointError, match=r"'transposed' is not the torch\.float32 \(4, 3\) promised"):
            TorchDistReader(checkpoint).read("transposed")

    def test_chunks_that_lie_on_each_other_are_refused(self, checkpoint: Path) -> None:
        def repeat(m: Any) -> None:
            entry = m.state_dict_metadata["f32"]
            entry.size = torch.Size([6, 7])  # two chunks of three rows, both at row 0
            entry.chunks.append(entry.chunks[0])

        _change_metadata(checkpoint, repeat)
        with pytest.raises(CheckpointError, match="chunks of 'f32'"):
            TorchDistReader(checkpoint).read("f32")

    def test_a_chunk_that_lies_outside_of_the_tensor_is_refused(self, checkpoint: Path) -> None:
        def shrink(m: Any) -> None:
            m.state_dict_metadata["f32"].size = torch.Size([2, 7])

        _change_metadata(checkpoint, shrink)
        with pytest.raises(CheckpointError, match="'f32'"):
            TorchDistReader(checkpoint).read("f32")

    def test_chunks_in_the_same_bytes_are_refused(self, checkpoint: Path) -> None:
        def share(m: Any) -> None:
            m.storage_data[_place("transposed", 2)] = m.storage_data[_place("f32", 2)]

        _change_metadata(checkpoint, share)
        with pytest.raises(CheckpointError, match=r"\.metadata.*'f32' and 'transposed' lie in the same bytes"):
            TorchDistReader(checkpoint)

    @pytest.mark.parametrize("size", [(2**62, 2**62), (2**62, 4), (2**40, 2**40, 0)])
    def test_sizes_that_no_tensor_has_are_refused(self, checkpoint: Path, size: tuple[int, ...]) -> None:
        def lie(m: Any) -> None:
            entry = m.state_dict_metadata["f32"]
            entry.size = torch.Size(size)
            entry.chunks[:] = [metadata.ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))]

        _change_metadata(checkpoint, lie)
        with pytest.raises(CheckpointError, match=r"\.metadata.*'f32' cannot have a part of shape"):
            TorchDistReader(checkpoint)

    @pytest.mark.parametrize("index", [(), (0,), (5,)])
    def test_more_values_than_there_are_bytes_are_refused_before_memory_is_reserved(
        self, checkpoint: Path, index: tuple[int, ...]
    ) -> None:
        def lie(m: Any) -> None:
            entry = m.state_dict_metadata["f32"]
            entry.size = torch.Size([2**30, 7])
            entry.chunks[0].sizes = torch.Size([2**30, 7])

        _change_metadata(checkpoint, lie)
        with pytest.raises(CheckpointError, match=r"the data of 'f32' takes \d+ bytes, 30064771072 are promised"):
            TorchDistReader(checkpoint).read("f32", index)

    def test_more_axes_than_can_be_checked_are_refused(self, checkpoint: Path) -> None:
        def lie(m: Any) -> None:
            entry = m.state_dict_metadata["f32"]
            entry.size = entry.chunks[0].sizes = entry.chunks[0].offsets = torch.Size([1] * 40)

        _change_metadata(checkpoint, lie)
        with pytest.raises(CheckpointError, match="chunks of 'f32' do not make up"):
            TorchDistReader(checkpoint).read("f32")

    def test_a_place_beyond_the_end_of_the_file_is_refused(self, checkpoint: Path) -> None:
        _change_metadata(checkpoint, lambda m: _move(m, "f32", offset=2**40))
        with pytest.raises(CheckpointError, match=r"distcp: the data of 'f32' is damaged: the file ends"):
            TorchDistReader(checkpoint).read("f32")

    @pytest.mark.parametrize(("field", "value"), [("offset", -1), ("length", -1), ("length", 1.5), ("offset", True)])
    def test_a_place_that_is_none_is_refused(self, checkpoint: Path, field: str, value: Any) -> None:
        _change_metadata(checkpoint, lambda m: _move(m, "f32", **{field: value}))
        with pytest.raises(CheckpointError, match=r"\.metadata.*the place of 'f32' is damaged"):
            TorchDistReader(checkpoint)

    def test_data_that_torch_compressed_is_refused(self, checkpoint: Path) -> None:
        _change_metadata(checkpoint, lambda m: _move(m, "f32", transform_descriptors=["zstd"]))
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
        _change_metadata(checkpoint, lambda m: delattr(m.state_dict_metadata["f32"], field))
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            TorchDistReader(checkpoint).read("f32")


def _place(name: str, dim: int) -> metadata.MetadataIndex:
    return metadata.MetadataIndex(name, torch.Size([0] * dim))


def _move(content: Any, name: str, **fields: Any) -> None:
    for field, value in fields.items():
        setattr(content.storage_data[_place(name, 2)], field, value)
