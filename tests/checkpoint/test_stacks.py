"""Stacks of tensors, written and read one element at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import metadata

from megatron_fp32.checkpoint.formats import torch_dist, torch_file
from megatron_fp32.checkpoint.formats.digests import Digests, digest
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.safetensors_writer import HuggingFaceWriter
from megatron_fp32.checkpoint.formats.section import Section
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.formats.torch_dist_writer import DataFile, TorchDistWriter, digest_of_chunk
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.weights.tensors import TensorInfo

_STACK = (2, 3)
_INDICES = list(itertools.product(range(2), range(3)))


def _whole(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)


def _write(directory: Path, whole: Tensor, indices: list[tuple[int, ...]] = _INDICES) -> Path:
    directory.mkdir()
    with TorchDistWriter(directory) as writer:
        for index in indices:
            writer.write("stack", whole[index], index=index, stack=_STACK)
        writer.finish({"content_metadata": {}})
    return directory


@pytest.mark.parametrize("stack", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (4, 3), (0,), (5, 0), (0, 5), (3, 0, 2)], ids=str)
def test_a_chunk_reads_back_as_what_was_written(tmp_path: Path, shape: tuple[int, ...], stack: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    with DataFile(tmp_path / "file") as file:
        file.write("before", torch.randn(3))
        file.write("tensor", tensor, index=(1,) * len(stack), stack=stack)
        assert digest_of_chunk(tmp_path / "file", file.chunks[-1]) == digest(tensor)


class TestTorchDist:
    @pytest.mark.parametrize("indices", [_INDICES, _INDICES[::-1]], ids=["in order", "backwards"])
    def test_the_whole_and_every_element_are_read(self, tmp_path: Path, indices: list[tuple[int, ...]]) -> None:
        whole = _whole()
        reader = TorchDistReader(_write(tmp_path / "checkpoint", whole, indices))
        assert reader.tensors["stack"] == TensorInfo(dtype=torch.bfloat16, shape=(2, 3, 4, 5))
        assert torch.equal(reader.read("stack"), whole)
        for index in [*_INDICES, (1,), (0,)]:
            assert torch.equal(reader.read("stack", index), whole[index])

    def test_an_element_is_a_chunk_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reader = TorchDistReader(_write(tmp_path / "checkpoint", _whole()))
        sizes: list[int] = []

        def open_section(file: BinaryIO, start: int, length: int) -> Section:
            sizes.append(length)
            return Section(file, start, length)

        monkeypatch.setattr(torch_file, "Section", open_section)
        reader.read("stack", (1, 2))
        assert len(sizes) == 1
        whole = (tmp_path / "checkpoint" / "__0_0.distcp").stat().st_size
        assert sizes[0] < whole / len(_INDICES)

    def test_torch_reads_it(self, tmp_path: Path) -> None:
        directory = _write(tmp_path / "checkpoint", _whole())
        state = {"stack": torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
        assert torch.equal(state["stack"], _whole())

    def test_megatron_loads_any_part_of_any_element(self, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
        directory = _write(tmp_path / "checkpoint", _whole())
        for rank, parts in enumerate(ranks(2).run(_load_halves, str(directory))):
            for index in _INDICES:
                assert torch.equal(parts[str(index)], _whole()[index].chunk(2)[rank])

    def test_elements_are_read_from_chunks_that_are_cut_otherwise(
        self, ranks: Callable[[int], RankPool], tmp_path: Path
    ) -> None:
        ranks(2).run(_save_halves, str(tmp_path))
        reader = TorchDistReader(tmp_path)
        assert len(reader._metadata.state_dict_metadata["stack"].chunks) == 4  # none of them is an element
        for index in _INDICES:
            assert torch.equal(reader.read("stack", index), _whole()[index])

    def test_a_missing_element_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"not written, or were written twice: \['stack'\]"):
            _write(tmp_path / "checkpoint", _whole(), _INDICES[1:])

    def test_an_element_that_is_written_twice_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"not written, or were written twice: \['stack'\]"):
            _write(tmp_path / "checkpoint", _whole(), [*_INDICES, (0, 0)])

    @pytest.mark.parametrize("other", [torch.zeros(4, 5), torch.zeros(5, 4, dtype=torch.bfloat16)])
    def test_elements_have_one_dtype_and_shape(self, tmp_path: Path, other: Tensor) -> None:
        with TorchDistWriter(tmp_path) as writer:
            writer.write("stack", _whole()[0, 0], index=(0, 0), stack=_STACK)
            writer.write("stack", other, index=(0, 1), stack=_STACK)
            with pytest.raises(ValueError, match=r"'stack' is torch.bfloat16 \(2, 3, 4, 5\), got"):
                writer.finish({})


def _load_halves(directory: str) -> dict[str, Tensor]:
    """Half of the rows of every element on each of two ranks, as tensor parallelism takes them."""
    with model_parallel(tensor=2):
        rank = dist.get_rank()
        wanted = {
            str(index): ShardedTensor.from_rank_offsets(
                "stack",
                torch.zeros(2, 5, dtype=torch.bfloat16),
                (0, index[0], 2),
                (1, index[1], 3),
                (2, rank, 2),
                prepend_axis_num=2,
            )
            for index in _INDICES
        }
        loaded: dict[str, Tensor] = dist_checkpointing.load(wanted, directory, strict="raise_unexpected")
        return loaded


def _save_halves(directory: str) -> None:
    """Chunks that hold parts of three elements each."""
    with model_parallel(tensor=2):
        rank = dist.get_rank()
        state = {
            layer: ShardedTensor.from_rank_offsets(
                "stack", _whole()[layer].chunk(2, dim=1)[rank], (0, layer, 2), (2, rank, 2), prepend_axis_num=1
            )
            for layer in range(2)
        }
        dist_checkpointing.save(state, directory)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.lists(st.integers(0, 3), max_size=3),
    boxes=st.lists(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 3), max_size=5),
    cut=st.booleans(),
)
def test_chunks_tile_a_tensor_exactly_when_every_value_lies_in_one(
    size: list[int], boxes: list[tuple[tuple[int, int], ...]], cut: bool
) -> None:
    if cut:  # unit boxes of the tensor itself, which the random ones rarely are
        boxes = [tuple((at, 1) for at in index) for index in itertools.product(*map(range, size))][: len(boxes) + 1]
    chunks = [
        metadata.ChunkStorageMetadata(
            offsets=torch.Size(o for o, _ in box[: len(size)]), sizes=torch.Size(s for _, s in box[: len(size)])
        )
        for box in boxes
    ]
    counts = torch.zeros([9] * len(size))
    for chunk in chunks:
        counts[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
    wanted = torch.zeros([9] * len(size))
    wanted[tuple(slice(s) for s in size)] = 1
    entry = metadata.TensorStorageMetadata(metadata.TensorProperties(dtype=torch.float32), torch.Size(size), chunks)
    assert torch_dist.covers(entry) is torch.equal(counts, wanted)


class TestHuggingFace:
    @pytest.fixture
    def whole(self) -> Tensor:
        return torch.randn(3, 4, 5)

    def test_elements_make_up_the_tensor(self, tmp_path: Path, whole: Tensor) -> None:
        infos = {
            "a": TensorInfo(dtype=torch.float32, shape=(2,)),
            "stack": TensorInfo(dtype=torch.float32, shape=(3, 4, 5)),
            "deep": TensorInfo(dtype=torch.float32, shape=(3, 4, 5)),
        }
        writer = HuggingFaceWriter(tmp_path, infos)
        for expert in (2, 0, 1):
            writer.write("stack", whole[expert], index=(expert,))
        for index in itertools.product(range(3), range(4)):
            writer.write("deep", whole[index], index=index)
        writer.write("a", torch.ones(2))
        writer.finish()
        loaded = load_file(tmp_path / "model.safetensors")
        assert torch.equal(loaded["stack"], whole)
        assert torch.equal(loaded["deep"], whole)
        assert loaded["a"].tolist() == [1, 1]
        with HuggingFaceReader(tmp_path) as reader:
            assert torch.equal(reader.read("stack", (1,)), whole[1])
            assert torch.equal(reader.read("stack", (1, 3)), whole[1, 3])

    def test_a_missing_element_is_named(self, tmp_path: Path, whole: Tensor) -> None:
        writer = HuggingFaceWriter(tmp_path, {"stack": TensorInfo(dtype=torch.float32, shape=(3, 4, 5))})
        writer.write("stack", whole[0], index=(0,))
        writer.write("stack", whole[2], index=(2,))
        with pytest.raises(ValueError, match=r"not written: \['stack'\]"):
            writer.finish()

    def test_what_does_not_fit_is_refused(self, tmp_path: Path, whole: Tensor) -> None:
        writer = HuggingFaceWriter(tmp_path, {"stack": TensorInfo(dtype=torch.float32, shape=(3, 4, 5))})
        for tensor, index in ((whole, (0,)), (whole[0].t(), (0,)), (whole[0].double(), (0,)), (whole[0], ())):
            with pytest.raises(ValueError, match=r"'stack' was declared torch.float32 \(3, 4, 5\)"):
                writer.write("stack", tensor, index=index)
        with pytest.raises(ValueError, match=r"the index \[3\]"):
            writer.write("stack", whole[0], index=(3,))
        writer.write("stack", whole[0], index=(0,))
        for index, tensor in (((0,), whole[0]), ((0,), whole[1])):
            with pytest.raises(ValueError, match="written already"):
                writer.write("stack", tensor, index=index)


class TestDigests:
    def test_a_whole_tensor_has_its_digest(self) -> None:
        digests, tensor = Digests(), torch.randn(3)
        assert digests.add("a", tensor) == digest(tensor)
        assert digests.by_name() == {"a": digest(tensor)}

    def test_a_stack_has_one_whatever_the_order(self) -> None:
        found = []
        for order in (_INDICES, _INDICES[::-1]):
            digests = Digests()
            for index in order:
                digests.add("stack", _whole()[index], index)
            found.append(digests.by_name())
        assert found[0] == found[1]

    def test_elements_that_change_places_change_it(self) -> None:
        first, second = Digests(), Digests()
        for digests, order in ((first, (0, 1)), (second, (1, 0))):
            for index, at in enumerate(order):
                digests.add("stack", torch.tensor([float(at)]), (index,))
        assert first.by_name() != second.by_name()
