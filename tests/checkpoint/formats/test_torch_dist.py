from __future__ import annotations

import io
import pickle
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

from megatron_fp32.checkpoint.formats.torch_dist import TRACKER, TorchDistReader, find_checkpoint
from megatron_fp32.checkpoint.formats.torch_dist_writer import TorchDistWriter, common_state
from megatron_fp32.errors import CheckpointError
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from tests.checkpoint.support import bits, example_tensors, write_torch_dist

_DATA = "__0_0.distcp"


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
        tensors = example_tensors()
        directory = write_torch_dist(tmp_path / "checkpoint", tensors)
        loaded = dist_checkpointing.load(_wanted_by_megatron(tensors), str(directory), strict=strict)
        assert all(_same(loaded[name], tensor) for name, tensor in tensors.items())
        assert loaded["object"].numel() == 0

    @pytest.mark.usefixtures("megatron")
    def test_megatron_finds_nothing_else_in_it(self, checkpoint: Path) -> None:
        try:
            dist_checkpointing.load(_wanted_by_megatron(example_tensors()), str(checkpoint), strict="raise_all")
        except CheckpointingException as error:
            # Releases that read common.pt do not know the object that later ones keep the same in.
            assert str(error).rstrip().endswith("Missing keys (for all ranks): {'common_state'}.")  # noqa: PT017

    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("strict", ["raise_unexpected", "raise_all"])
    def test_megatron_misses_what_is_not_in_it(self, checkpoint: Path, strict: str) -> None:
        wanted = _wanted_by_megatron({**example_tensors(), "absent": torch.zeros(1)})
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
        tensors = example_tensors()
        directory = write_torch_dist(tmp_path / "checkpoint", tensors)
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
        write_torch_dist(tmp_path / "checkpoint", {"slice": whole[:10]})
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
        tensors = example_tensors()
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
        reader = TorchDistReader(tmp_path)
        assert {n: (i.dtype, i.shape) for n, i in reader.tensors.items()} == {
            n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
        }
        assert all(_same(reader.read(name), tensor) for name, tensor in tensors.items())

    @pytest.mark.parametrize("index", [(3,), (-1,), (0, 7), (0, 0, 0)])
    def test_a_part_that_is_not_there_is_an_error(self, checkpoint: Path, index: tuple[int, ...]) -> None:
        with pytest.raises(IndexError, match="does not have the index"):
            TorchDistReader(checkpoint).read("f32", index)

    def test_a_reader_can_be_sent_to_another_process(self, checkpoint: Path) -> None:
        reader = TorchDistReader(checkpoint)
        sent = pickle.loads(pickle.dumps(reader))
        assert all(_same(sent.read(name), reader.read(name)) for name in reader.tensors)

    def test_objects_are_no_tensors(self, checkpoint: Path) -> None:
        reader = TorchDistReader(checkpoint)
        assert sorted(reader.objects) == ["common_state/shard_0_1", "module._extra_state/shard_0_1"]
        with pytest.raises(CheckpointError, match=r"common_state/shard_0_1' is not a tensor"):
            reader.read("common_state/shard_0_1")

    def test_neither_writing_nor_reading_needs_megatron(self, tmp_path: Path) -> None:
        script = (
            "import sys, torch\n"
            "sys.modules['megatron'] = None\n"
            "from megatron_fp32.checkpoint import convert\n"
            "from megatron_fp32.checkpoint.formats import torch_dist, torch_dist_writer\n"
            "with torch_dist_writer.TorchDistWriter(sys.argv[1]) as writer:\n"
            "    writer.write('a', torch.arange(3))\n"
            "    writer.finish({})\n"
            "assert torch_dist.TorchDistReader(sys.argv[1]).read('a').tolist() == [0, 1, 2]\n"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
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
        with pytest.raises(CheckpointError, match="must hold 'release' or the number of an iteration"):
            find_checkpoint(checkpoint.parent)

    def test_a_checkpoint_that_it_names_must_exist(self, tmp_path: Path) -> None:
        (tmp_path / TRACKER).write_text("5")
        with pytest.raises(CheckpointError, match=r"names iteration 5, but there is no iter_0000005"):
            find_checkpoint(tmp_path)

    def test_a_directory_without_it_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is not a Megatron torch_dist checkpoint"):
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
