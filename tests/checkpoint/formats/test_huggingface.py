from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

from megatron_fp32.checkpoint.formats.huggingface import INDEX, HuggingFaceReader
from megatron_fp32.checkpoint.formats.safetensors_file import read_header
from megatron_fp32.checkpoint.formats.safetensors_writer import HuggingFaceWriter, SafetensorsFile
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, TensorInfo, info_of
from tests.checkpoint.support import bits, stored_tensors
from tests.conftest import Source


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bit patterns: NaN payloads, infinities and subnormals among them."""
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def _one_of_each() -> dict[str, Tensor]:
    tensors = {f"odd.{name}": _random(dtype, 3, 5) for name, dtype in DTYPES.items()}
    scalar = {f"scalar.{name}": _random(DTYPES[name]) for name in ("F32", "BF16", "BOOL", "F8_E4M3")}
    empty = {f"empty.{name}": _random(DTYPES[name], 0, 7) for name in ("F32", "BF16", "I64")}
    return {**tensors, **scalar, **empty}


def _write(directory: Path, tensors: dict[str, Tensor], **options: int) -> Path:
    infos = {n: info_of(t.dtype, t.shape) for n, t in tensors.items()}
    writer = HuggingFaceWriter(directory, infos, **options)
    for name in reversed(tensors):  # values may come in any order
        writer.write(name, tensors[name])
    writer.finish()
    return directory


def _assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(ours[name]), bits(tensor)), name


def test_safetensors_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    tensors = _one_of_each()
    _write(tmp_path, tensors)
    _assert_same(load_file(tmp_path / "model.safetensors"), tensors)


def test_the_reader_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = _one_of_each()
    save_file(tensors, tmp_path / "model.safetensors")
    with HuggingFaceReader(tmp_path) as reader:
        header = stored_tensors(tmp_path)
        assert {name: info.shape for name, info in reader.tensors.items()} == {
            name: tuple(shape) for name, (_, shape, _) in header.items()
        }
        assert {name: DTYPE_NAMES[info.dtype] for name, info in reader.tensors.items()} == {
            name: dtype for name, (dtype, _, _) in header.items()
        }
        _assert_same({name: reader.read(name) for name in reader.tensors}, tensors)


@pytest.mark.parametrize("limit", [5 * 10**9, 100])
def test_every_tensor_is_aligned_to_its_item(tmp_path: Path, limit: int) -> None:
    _write(tmp_path, dict(sorted(_one_of_each().items(), reverse=True)), max_shard_bytes=limit)
    for path in tmp_path.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                assert (8 + length + entry["data_offsets"][0]) % DTYPES[entry["dtype"]].itemsize == 0, name


def test_a_file_alone_is_aligned_however_its_tensors_are_declared(tmp_path: Path) -> None:
    """In the order of safetensors' own writer, wider items first: the format allows no gap."""
    tensors = {
        "a": torch.zeros(15).to(torch.float8_e4m3fn),
        "b": torch.randn(2),
        "c": torch.randn(3).bfloat16(),
        "d": torch.zeros(0),
        "e": torch.randn(1, dtype=torch.float64),
        "f": torch.ones(3, dtype=torch.bool),
        "g": torch.arange(5),
    }
    file = SafetensorsFile(
        tmp_path / "ours", {n: TensorInfo(dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items()}
    )
    for name, tensor in tensors.items():
        file.write(name, tensor)
    file.finish()
    save_file(tensors, tmp_path / "theirs")
    ours, theirs = (read_header(tmp_path / name) for name in ("ours", "theirs"))
    assert {name: start % tensors[name].element_size() for name, start in ours.starts.items()} == dict.fromkeys(
        tensors, 0
    )
    widths = [
        [
            tensors[name].element_size()
            for name in sorted(tensors, key=header.starts.__getitem__)
            if tensors[name].numel()
        ]
        for header in (ours, theirs)
    ]
    assert widths[0] == widths[1]
    loaded = load_file(tmp_path / "ours")
    assert all(torch.equal(bits(loaded[name]), bits(tensor)) for name, tensor in tensors.items())


def test_a_tensor_that_is_no_block_of_memory_is_written_in_its_order(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"transposed": base.t(), "strided": base[::2, 1::2], "expanded": base[:1].expand(3, 6)}
    _write(tmp_path, tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


_tensors = st.dictionaries(
    st.text('abc.é"\\/', min_size=1, max_size=5),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)).filter(
        lambda tensor: tensor[0] != "F4" or bool(tensor[1])
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(described=_tensors, limit=st.integers(1, 200))
def test_any_tensors_come_back(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[str, list[int]]], limit: int
) -> None:
    tensors = {name: _random(DTYPES[dtype], *shape) for name, (dtype, shape) in described.items()}
    directory = _write(tmp_path_factory.mktemp("any"), tensors, max_shard_bytes=limit)
    loaded = {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}
    _assert_same(loaded, tensors)
    with HuggingFaceReader(directory) as reader:
        _assert_same({name: reader.read(name) for name in reader.tensors}, tensors)


def test_files_stay_below_the_limit_and_the_index_names_them(tmp_path: Path) -> None:
    tensors = {f"t{i}": _random(torch.float32, i) for i in (3, 9, 2, 40, 1, 5)}  # 160 bytes alone pass the limit
    _write(tmp_path, tensors, max_shard_bytes=50)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [p.name for p in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * (3 + 9 + 2 + 40 + 1 + 5)
    contents = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {name: file for file, held in contents.items() for name in held}
    for held in contents.values():
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 50
    _assert_same({n: t for held in contents.values() for n, t in held.items()}, tensors)


def test_transformers_loads_a_sharded_checkpoint(source: Source, tmp_path: Path) -> None:
    original = load_file(source() / "model.safetensors")
    _write(tmp_path, original, max_shard_bytes=2000)
    (tmp_path / "config.json").write_bytes((source() / "config.json").read_bytes())
    model, report = Qwen3_5ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = dict(model.named_parameters())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in original.items())


class TestWriterRefuses:
    @pytest.fixture
    def writer(self, tmp_path: Path) -> HuggingFaceWriter:
        return HuggingFaceWriter(tmp_path, {"a": TensorInfo(dtype=torch.float32, shape=(2, 3))})

    def test_an_undeclared_tensor(self, writer: HuggingFaceWriter) -> None:
        with pytest.raises(ValueError, match="'b' was not declared"):
            writer.write("b", torch.zeros(2, 3))

    def test_a_tensor_twice(self, writer: HuggingFaceWriter) -> None:
        writer.write("a", torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"'a'.*written already"):
            writer.write("a", torch.zeros(2, 3))

    @pytest.mark.parametrize("tensor", [torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, dtype=torch.int32)])
    def test_another_shape_or_dtype(self, writer: HuggingFaceWriter, tensor: Tensor) -> None:
        with pytest.raises(ValueError, match=r"'a' was declared torch.float32 \(2, 3\)"):
            writer.write("a", tensor)

    def test_to_finish_early(self, writer: HuggingFaceWriter) -> None:
        with pytest.raises(ValueError, match=r"not written: \['a'\]"):
            writer.finish()

    def test_to_write_over_a_file(self, writer: HuggingFaceWriter, tmp_path: Path) -> None:
        with pytest.raises(FileExistsError):
            HuggingFaceWriter(tmp_path, {"b": TensorInfo(dtype=torch.float32, shape=(1,))})


class TestReaderRefuses:
    @pytest.fixture
    def sharded(self, tmp_path: Path) -> Path:
        save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
        save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
        _index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
        return tmp_path

    def test_nothing_while_all_is_well(self, sharded: Path) -> None:
        with HuggingFaceReader(sharded) as reader:
            assert reader.tensors.keys() == {"a", "b"}

    def test_a_directory_without_weights(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
            HuggingFaceReader(tmp_path)

    def test_a_missing_file(self, sharded: Path) -> None:
        (sharded / "two.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
            HuggingFaceReader(sharded)

    def test_a_missing_tensor(self, sharded: Path) -> None:
        _index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
        with pytest.raises(CheckpointError, match=r"two\.safetensors does not have.*\['c'\]"):
            HuggingFaceReader(sharded)

    def test_a_tensor_in_two_files(self, sharded: Path) -> None:
        save_file({"a": torch.zeros(2), "b": torch.ones(2)}, sharded / "two.safetensors")
        with pytest.raises(CheckpointError, match="'a' is in more than one file"):
            HuggingFaceReader(sharded)

    def test_a_tensor_that_the_index_does_not_name(self, sharded: Path) -> None:
        save_file({"b": torch.ones(2), "c": torch.ones(2)}, sharded / "two.safetensors")
        with pytest.raises(CheckpointError, match=r"two\.safetensors has tensors .* does not list for it: \['c'\]"):
            HuggingFaceReader(sharded)

    def test_a_name_twice_in_the_index(self, sharded: Path) -> None:
        (sharded / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "b": "x", "b": "two.safetensors"}}')
        with pytest.raises(CheckpointError, match=r"index\.json.*it has the key 'b' twice"):
            HuggingFaceReader(sharded)

    @pytest.mark.parametrize("file", ["", ".", "..", "x" * 5000, "a\0b", "\ud800"])
    def test_an_index_that_names_no_file(self, sharded: Path, file: str) -> None:
        _index(sharded, {"a": "one.safetensors", "b": file})
        with pytest.raises(CheckpointError, match=r"is missing|outside of its directory|surrogates not allowed"):
            HuggingFaceReader(sharded)

    @pytest.mark.parametrize("file", ["../outside.safetensors", "sub/in.safetensors"])
    def test_an_index_that_leads_elsewhere(self, tmp_path: Path, file: str) -> None:
        here = tmp_path / "here"
        (here / "sub").mkdir(parents=True)
        save_file({"a": torch.ones(2)}, here / file)
        _index(here, {"a": file})
        with pytest.raises(CheckpointError, match="files outside of its directory"):
            HuggingFaceReader(here)

    def test_an_absolute_path_in_the_index(self, sharded: Path) -> None:
        _index(sharded, {"a": str(sharded / "one.safetensors")})
        with pytest.raises(CheckpointError, match="files outside of its directory"):
            HuggingFaceReader(sharded)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", "[" * 10**5, '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "\xff"]
    )
    def test_an_index_that_is_none(self, sharded: Path, text: str) -> None:
        (sharded / INDEX).write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"index\.json is not a safetensors index"):
            HuggingFaceReader(sharded)

    @pytest.mark.parametrize("keep", [0, 4, 20, -1])
    def test_a_truncated_file(self, tmp_path: Path, keep: int) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"a": torch.ones(64)}, path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
            HuggingFaceReader(tmp_path)

    @pytest.mark.parametrize("header", [b"not json at all!", b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'])
    def test_a_damaged_header(self, tmp_path: Path, header: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            HuggingFaceReader(tmp_path)

    def test_a_dtype_that_it_does_not_know(self, tmp_path: Path) -> None:
        header = b'{"a":{"dtype":"F6_E3M2","shape":[4],"data_offsets":[0,3]}}'
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
        with pytest.raises(CheckpointError, match=r"'a' has the dtype F6_E3M2, which torch does not have"):
            HuggingFaceReader(tmp_path)


def _index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
