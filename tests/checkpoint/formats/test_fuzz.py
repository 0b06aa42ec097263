"""Mutated files: an error that names the file, or the tensors as they were. Never anything else.

Values in safetensors files carry no checksum, so only names, dtypes and shapes are certain there; the safetensors
package is the witness of what such a file says. Values in `.distcp` files carry one unless the writer left it out. The
names in `.metadata` carry none: a tensor that is missing under its name is for the plan of a conversion to refuse.

FUZZ_EXAMPLES=20000 python -m pytest tests/checkpoint/formats/test_fuzz.py looks for longer, and elsewhere every time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fp32.checkpoint.formats.common_state import read_common_state
from megatron_fp32.checkpoint.formats.huggingface import INDEX, HuggingFaceReader
from megatron_fp32.checkpoint.formats.json_file import parse_json
from megatron_fp32.checkpoint.formats.torch_dist import TRACKER, TorchDistReader
from megatron_fp32.checkpoint.formats.torch_dist_writer import TorchDistWriter
from megatron_fp32.checkpoint.plan import plan_import
from megatron_fp32.checkpoint.sidecar import find_sidecar
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import TensorInfo
from tests.checkpoint.formats.mutations import Mutation, mutations
from tests.checkpoint.support import bits
from tests.families import case

_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzzed = settings(
    max_examples=_EXAMPLES or 100,
    derandomize=not _EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
pytestmark = [pytest.mark.timeout(300 + _EXAMPLES)]

MEMORY = 2**30
"""Address space that reading a file of some kilobytes may take."""


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """More than `MEMORY` is an error inside the block."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read: Callable[[], Any], *names: str) -> Any:
    """What was read, or None after an error that names one of the files."""
    try:
        with little_memory():
            return read()
    except CheckpointError as error:
        _check_message(error, names)
        return None


def _check_message(error: Exception, names: tuple[str, ...]) -> None:
    assert any(name in str(error) for name in names), str(error)
    assert len(str(error)) < 5000
    cause: BaseException | None = error
    while cause is not None:
        assert not isinstance(cause, MemoryError), cause
        assert "allocate" not in str(cause), cause
        cause = cause.__cause__


def _read_all(reader: HuggingFaceReader | TorchDistReader) -> dict[str, Tensor]:
    return {name: reader.read(name) for name in reader.tensors}


def _same(a: dict[str, Tensor], b: dict[str, Tensor], *, values: bool = True) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape) and (not values or torch.equal(bits(a[n]), bits(b[n])))
        for n in a
    )


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layers.0.weight": torch.randn(5, 7, generator=generator),
        "layers.1.weight": torch.randn(5, 7, generator=generator),
        "norm": torch.randn(11, generator=generator).bfloat16(),
        "scale": torch.tensor(2.0),
        "none": torch.empty(0, 3),
    }


def _open(directory: Path) -> dict[str, Tensor]:
    with HuggingFaceReader(directory) as reader:
        return _read_all(reader)


@pytest.fixture(scope="module")
def safetensors_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("safetensors")
    save_file(_tensors(), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@fuzzed
@given(mutate=mutations())
def test_a_safetensors_file(safetensors_dir: Path, tmp_path: Path, mutate: Mutation) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(mutate((safetensors_dir / "model.safetensors").read_bytes()))
    found = outcome(lambda: _open(tmp_path), str(path))
    if found is not None:
        assert _same(found, load_file(path))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, tensors = tmp_path_factory.mktemp("indexed"), _tensors()
    halves = {
        "model-00001-of-00002.safetensors": sorted(tensors)[:2],
        "model-00002-of-00002.safetensors": sorted(tensors)[2:],
    }
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 330}, "weight_map": weight_map}, indent=2))
    return directory


@fuzzed
@given(mutate=mutations())
def test_an_index(indexed: Path, tmp_path: Path, mutate: Mutation) -> None:
    directory = shutil.copytree(indexed, tmp_path, dirs_exist_ok=True)
    (directory / INDEX).write_bytes(mutate((indexed / INDEX).read_bytes()))
    found = outcome(lambda: _open(directory), str(directory / "model"), INDEX)
    assert found is None or _same(found, _tensors())


COMMON = {
    "args": Namespace(num_layers=2, dtype=torch.bfloat16),
    "iteration": 7,
    "t": torch.arange(5),
    "path": Path("/a"),
}


@pytest.fixture(scope="module")
def megatron_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Checkpoints with and without checksums."""
    made = {}
    before = torch.serialization.get_crc32_options()
    try:
        for checksums in (True, False):
            torch.serialization.set_crc32_options(checksums)
            made[checksums] = tmp_path_factory.mktemp("megatron")
            directory = made[checksums] / "iter_0000007"
            directory.mkdir()
            with TorchDistWriter(directory) as writer:
                for name, tensor in _tensors().items():
                    writer.write(name, tensor)
                for i in range(3):
                    writer.write("stack", torch.full((4, 2), float(i)), index=(i,), stack=(3,))
                writer.write_object("module._extra_state/shard_0_1", torch.empty(0, dtype=torch.uint8))
                writer.finish(COMMON)
            (made[checksums] / TRACKER).write_text("7")
    finally:
        torch.serialization.set_crc32_options(before)
    return made


def _mutated(source: Path, directory: Path, name: str, mutate: Mutation) -> Path:
    """A copy of a checkpoint with one file changed."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    path = directory / name
    path.write_bytes(mutate((source / name).read_bytes()))
    return path


def _megatron_tensors() -> dict[str, Tensor]:
    return {**_tensors(), "stack": torch.stack([torch.full((4, 2), float(i)) for i in range(3)])}


@fuzzed
@given(mutate=mutations())
def test_metadata(megatron_dirs: dict[bool, Path], tmp_path: Path, mutate: Mutation) -> None:
    path = _mutated(megatron_dirs[True], tmp_path, "iter_0000007/.metadata", mutate)
    reader = outcome(lambda: TorchDistReader(tmp_path), str(path))
    if reader is None:
        return
    original = _megatron_tensors()
    files = (str(path), str(path.with_name("__0_0.distcp")), "the data file ")
    same_names = reader.tensors.keys() == original.keys()
    for name in reader.tensors:
        found = outcome(lambda name=name: reader.read(name), *files)
        part = outcome(lambda name=name: _first(reader, name), *files)
        if same_names and found is not None:
            assert _same({name: found}, {name: original[name]})
        if found is not None and part is not None and part.numel():
            assert torch.equal(bits(part), bits(found[0]))


def _first(reader: TorchDistReader, name: str) -> Tensor | None:
    shape = reader.tensors[name].shape
    return reader.read(name, (0,)) if shape and shape[0] else None


@pytest.mark.parametrize("checksums", [True, False])
@fuzzed
@given(mutate=mutations())
def test_data(megatron_dirs: dict[bool, Path], tmp_path: Path, checksums: bool, mutate: Mutation) -> None:
    path = _mutated(megatron_dirs[checksums], tmp_path, "iter_0000007/__0_0.distcp", mutate)
    reader, original = TorchDistReader(tmp_path), _megatron_tensors()
    for name, tensor in original.items():
        found = outcome(lambda name=name: reader.read(name), str(path))
        assert found is None or _same({name: found}, {name: tensor}, values=checksums), name
        if tensor.dim() and tensor.shape[0]:
            part = outcome(lambda name=name: reader.read(name, (1,)), str(path))
            assert part is None or _same({name: part}, {name: tensor[1]}, values=checksums), name


@pytest.mark.parametrize("name", ["iter_0000007/metadata.json", TRACKER])
@fuzzed
@given(mutate=mutations())
def test_small_files(megatron_dirs: dict[bool, Path], tmp_path: Path, name: str, mutate: Mutation) -> None:
    path = _mutated(megatron_dirs[True], tmp_path, name, mutate)
    found = outcome(lambda: _read_all(TorchDistReader(tmp_path)), str(path), TRACKER)
    assert found is None or _same(found, _megatron_tensors())


@pytest.mark.parametrize("checksums", [True, False])
@fuzzed
@given(mutate=mutations())
def test_common_state(megatron_dirs: dict[bool, Path], tmp_path: Path, checksums: bool, mutate: Mutation) -> None:
    path = _mutated(megatron_dirs[checksums], tmp_path, "iter_0000007/common.pt", mutate)
    found = outcome(lambda: read_common_state(TorchDistReader(tmp_path)), str(path))
    if found is not None and checksums:
        assert repr(found) == repr(read_common_state(TorchDistReader(megatron_dirs[True])))


@fuzzed
@given(mutate=mutations())
def test_pickles_beside_their_checksums(megatron_dirs: dict[bool, Path], tmp_path: Path, mutate: Mutation) -> None:
    """The pickle itself is changed, in a file that is whole."""
    shutil.copytree(megatron_dirs[True], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "iter_0000007" / "common.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, mutate(content) if name.endswith("data.pkl") else content)
    found = outcome(lambda: read_common_state(TorchDistReader(tmp_path)), str(path))
    if found is not None:
        repr(found)


@fuzzed
@given(mutate=mutations())
def test_a_listing(tmp_path: Path, mutate: Mutation) -> None:
    entry = {"dtype": "BF16", "shape": [4, 2], "xxh3_128": "0123456789abcdef" * 2}
    listing = {"version": 2, "tensors": {"a": entry, "b": entry}, "carried": {"c": entry}, "left_out": ["d"]}
    path = tmp_path / "source.json"
    path.write_bytes(mutate(json.dumps(listing).encode()))
    found = outcome(lambda: find_sidecar(tmp_path, tmp_path), str(path), "does not hold hf_source")
    for tensor in () if found is None else (*found.tensors.values(), *found.carried.values()):
        assert all(type(size) is int and size >= 0 for size in tensor.info.shape)
        assert len(bytes.fromhex(tensor.digest)) == 16


@pytest.fixture(scope="module")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, dict[str, TensorInfo]]]:
    """`config.json` and the tensors beside it."""
    made = {}
    for name in FAMILIES:
        directory = case(name).write(tmp_path_factory.mktemp("family") / "hf")
        made[name] = (directory / "config.json").read_bytes(), HuggingFaceReader(directory).tensors
    return made


FAMILIES = ("Llama", "Qwen3-MoE, a dense layer", "Qwen3-Next", "Qwen3.5-VL-MoE")


@pytest.mark.parametrize("name", FAMILIES)
@fuzzed
@given(mutate=mutations())
def test_a_configuration(
    configurations: dict[str, tuple[bytes, dict[str, TensorInfo]]], name: str, mutate: Mutation
) -> None:
    content, tensors = configurations[name]
    try:
        with little_memory():
            plan = plan_import(parse_json(mutate(content)), tensors, vision="drop")
    except ValueError as error:
        _check_message(error, ("",))
    else:
        planned = {*plan.hf_shapes, *plan.left_out}
        assert planned == tensors.keys()
        assert all(shape == tensors[name].shape for name, shape in plan.hf_shapes.items())
