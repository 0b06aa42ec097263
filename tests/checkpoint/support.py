"""What checkpoints hold, read without the package; how tests change them; what a comparison says of them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fp32.checkpoint.compare.findings import TensorDifference, VerifyReport
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.formats.torch_dist_writer import TorchDistWriter
from tests.families import Case

A_LOG = "model.layers.0.linear_attn.A_log"
NORM = "model.layers.0.linear_attn.norm.weight"

StoredTensor = tuple[str, list[int], bytes]
Tensors = dict[str, Tensor]
Changes = Callable[[Tensors], Tensors]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Dtype, shape and bytes of every tensor, cut out of the files by hand."""
    found: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        content = path.read_bytes()
        data = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:data]).items():
            if name != "__metadata__":
                assert name not in found
                start, end = entry["data_offsets"]
                found[name] = (entry["dtype"], entry["shape"], content[data + start : data + end])
    return found


def assets(directory: Path) -> dict[str, bytes]:
    """Every file that is no weights."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if ".safetensors" not in p.name}


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in directory.rglob("*")}


def rewrite(directory: Path, change: Changes) -> Path:
    """Put other tensors into a checkpoint of one file."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return directory


def bits(tensor: Tensor) -> Tensor:
    """The bytes, for comparing bit for bit."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_parity(ours: Tensor, case: Case, hf: Path, tokens: Tensor) -> None:
    """Not farther from transformers in float64 than a few times transformers in fp32 is."""
    with torch.no_grad():
        exact = case.load(hf, torch.float64)(tokens).logits
        theirs = case.load(hf, torch.float32)(tokens).logits
    assert exact.std() > 1  # small logits would hide a wrong body
    assert (ours - exact).abs().max() < 4 * (theirs - exact).abs().max()


def resave(directory: Path, out: Path, change: Changes) -> Path:
    """A Megatron checkpoint with other tensors, as a trainer somewhere else might have left it."""
    reader = TorchDistReader(directory)
    out.mkdir()
    with TorchDistWriter(out) as writer:
        for name, tensor in change({name: reader.read(name) for name in reader.tensors}).items():
            writer.write(name, tensor)
        writer.finish({})
    return out


def example_tensors() -> dict[str, Tensor]:
    random = {
        "f32": torch.randint(0, 256, (3, 7, 4), dtype=torch.uint8).view(torch.float32).squeeze(-1),
        "bf16": torch.randint(0, 256, (5, 2), dtype=torch.uint8).view(torch.bfloat16),
        "fp8": torch.randint(0, 256, (9,), dtype=torch.uint8).view(torch.float8_e4m3fn),
        "i64": torch.randint(-(2**40), 2**40, (2, 3)),
    }
    return {**random, "transposed": torch.arange(12.0).reshape(3, 4).t(), "scalar": torch.tensor(1.5)}


def write_torch_dist(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    with TorchDistWriter(directory) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.write_object("module._extra_state/shard_0_1", torch.empty(0, dtype=torch.uint8))
        writer.finish({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}})
    return directory


def change_metadata(directory: Path, change: Callable[[Any], object]) -> None:
    path = directory / ".metadata"
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


def altered(hf: Path, out: Path, *changes: Changes, config: dict[str, Any] | None = None) -> Path:
    """A copy of a checkpoint of one file, with changes and another `config.json`."""
    shutil.copytree(hf, out)
    if config is not None:
        (out / "config.json").write_text(json.dumps(config))
    for change in changes:
        rewrite(out, change)
    return out


def each(**changes: Callable[[Tensor], Tensor]) -> Changes:
    """Change the tensors whose names end so."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: next((f for end, f in changes.items() if name.endswith(end)), lambda t: t)(tensor)
            for name, tensor in tensors.items()
        }

    return change


def without(*ends: str) -> Changes:
    """Leave out tensors whose names end so."""
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(ends)}


def without_start(*starts: str) -> Changes:
    """Leave out tensors whose names start so."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}


def statuses_of(report: VerifyReport) -> dict[str, str]:
    """What a comparison says of each tensor that differs."""
    return {difference.name: difference.status for difference in report.differences}


def the_only(report: VerifyReport) -> TensorDifference:
    """What a comparison says of the one tensor that differs."""
    (difference,) = report.differences
    return difference


def load_tensors(directory: Path) -> Tensors:
    """All tensors of a Hugging Face directory, as the safetensors package reads them."""
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


def assert_differences(report: VerifyReport, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The report says what float64 says of two checkpoints with the same names, shapes and dtypes."""
    assert a.keys() == b.keys()
    expected = {}
    for name, first in a.items():
        x, y = first.double(), b[name].double()
        if not torch.equal(x, y):
            sizes = (x - y).abs()
            relative = (sizes / torch.maximum(x.abs(), y.abs())).nan_to_num(0)
            expected[name] = (int((x != y).sum()), float(sizes.max()), float(relative.max()))
    found = {}
    for difference in report.differences:
        values = difference.values
        assert difference.status == "values"
        assert values is not None
        assert values.absolute is not None
        assert values.relative is not None
        found[difference.name] = (values.count, values.absolute.size, values.relative.size)
        pair = a[difference.name][values.absolute.index], b[difference.name][values.absolute.index]
        assert (values.absolute.a, values.absolute.b) == (float(pair[0]), float(pair[1]))
        assert abs(values.absolute.a - values.absolute.b) == values.absolute.size
    assert found == {n: (count, size, pytest.approx(relative)) for n, (count, size, relative) in expected.items()}
    assert (report.compared, report.equal) == (len(a), len(a) - len(expected))


def quantization_of(directory: Path) -> dict[str, Any]:
    """What `config.json` says of the quantization."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config["quantization_config"]
