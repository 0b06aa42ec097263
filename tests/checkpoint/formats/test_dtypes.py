"""Every dtype that torch has: read, written, carried, inspected and compared, in safetensors and in `torch_dist`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fp32.checkpoint.compare.difference import Comparison
from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.formats.safetensors_writer import SafetensorsFile
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.inspect import inspect_checkpoint
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.cli import main
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, info_of
from tests.checkpoint.support import bits, rewrite, statuses_of, stored_tensors, the_only, write_torch_dist
from tests.families import case

TORCH_ALONE = (torch.complex128, torch.complex32)
"""dtypes that `torch.save` takes and safetensors does not have."""

STORABLE = (*DTYPES.values(), *TORCH_ALONE)
by_dtype = pytest.mark.parametrize("dtype", STORABLE, ids=str)


def _random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bits; `shape` is torch's."""
    generator = torch.Generator().manual_seed(seed)
    size, end = (*shape[:-1], shape[-1] * dtype.itemsize), 2 if dtype == torch.bool else 256
    return torch.randint(0, end, size, dtype=torch.uint8, generator=generator).view(dtype)


def _with_one_bit_less(tensor: Tensor) -> Tensor:
    changed = tensor.view(torch.uint8).clone()
    changed.view(-1)[-1] ^= 1
    return changed.view(tensor.dtype)


def _every() -> dict[str, Tensor]:
    return {f"t.{DTYPE_NAMES[dtype]}": _random(dtype, 6, 4) for dtype in STORABLE}


def test_every_dtype_of_the_safetensors_package_is_here() -> None:
    from safetensors import torch as theirs

    assert theirs._SIZE.keys() - {None} == set(DTYPES.values())


def test_no_dtype_of_torch_is_without_a_name() -> None:
    all_of_torch = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert DTYPE_NAMES.keys() == all_of_torch
    assert len(set(DTYPE_NAMES.values())) == len(all_of_torch)


class TestSafetensors:
    @pytest.mark.parametrize("name", sorted(DTYPES))
    def test_a_tensor_that_is_carried_comes_back(self, name: str, tmp_path: Path) -> None:
        extra = {"model.visual.extra": _random(DTYPES[name], 6, 4), "model.visual.none": _random(DTYPES[name], 0, 4)}
        hf = rewrite(case("Qwen3").write(tmp_path / "hf"), lambda tensors: {**tensors, **extra})
        import_checkpoint(hf, tmp_path / "megatron", vision="carry")
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
        assert stored_tensors(tmp_path / "out") == stored_tensors(hf)
        assert verify_checkpoints(hf, tmp_path / "megatron").agrees()
        shape = stored_tensors(hf)["model.visual.extra"][1]
        found = inspect_checkpoint(tmp_path / "out")
        assert found.tensors["model.visual.extra"].shape == tuple(shape)
        result = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--match", "*.extra", "--json"])
        assert json.loads(result.stdout)["listed"] == {
            "model.visual.extra": {"dtype": name, "shape": shape, "nbytes": 24 * DTYPES[name].itemsize}
        }
        assert CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--tensors"]).exit_code == 0

    @pytest.mark.parametrize("name", sorted(DTYPES))
    def test_a_bit_that_differs_is_found(self, name: str, tmp_path: Path) -> None:
        for directory, change in (("a", Tensor.detach), ("b", _with_one_bit_less)):
            (tmp_path / directory).mkdir()
            save_file({"t": change(_random(DTYPES[name], 6, 4))}, tmp_path / directory / "model.safetensors")
        a, b = tmp_path / "a", tmp_path / "b"
        assert verify_checkpoints(a, a).agrees()
        difference = the_only(verify_checkpoints(a, b))
        assert difference.status == "values"
        assert difference.values is not None
        last = tuple(size - 1 for size in stored_tensors(a)["t"][1])
        # The lower half of a byte of float4 is the first of its two values.
        assert (difference.values.count, difference.values.first) == (1, (5, 6) if name == "F4" else last)
        result = CliRunner().invoke(main, ["verify", str(a), str(b), "--json"])
        assert result.exit_code == 1
        assert json.loads(result.stdout)["differences"][0]["a"]["dtype"] == name
        assert CliRunner().invoke(main, ["verify", str(a), str(b)]).exit_code == 1

    @pytest.mark.parametrize("name", ["U16", "U32", "U64", "C64", "BOOL", "I8"])
    def test_a_weight_of_such_a_dtype_is_refused_by_name(self, name: str, tmp_path: Path) -> None:
        weight = "model.norm.weight"
        hf = rewrite(
            case("Qwen3").write(tmp_path / "hf"), lambda t: {**t, weight: _random(DTYPES[name], *t[weight].shape)}
        )
        with pytest.raises(CheckpointError, match=rf"{weight} are {DTYPES[name]}; expected a floating-point dtype"):
            import_checkpoint(hf, tmp_path / "megatron")

    @pytest.mark.parametrize("name", ["F8_E8M0", "F4", "F8_E4M3FNUZ"])
    def test_such_a_checkpoint_is_quantized_already(self, name: str, tmp_path: Path) -> None:
        extra = {"scales": _random(DTYPES[name], 6, 4)}
        hf = rewrite(case("Qwen3").write(tmp_path / "hf"), lambda tensors: {**tensors, **extra})
        with pytest.raises(CheckpointError, match=f"quantized already: scales is {DTYPES[name]}"):
            quantize_checkpoint(hf, tmp_path / "fp8", "blockwise")

    def test_what_is_not_quantized_keeps_its_dtype(self, tmp_path: Path) -> None:
        extra = {f"extra.{name}": _random(DTYPES[name], 6, 4) for name in ("U16", "U32", "U64", "C64", "BOOL")}
        hf = rewrite(case("Qwen3").write(tmp_path / "hf"), lambda tensors: {**tensors, **extra})
        quantize_checkpoint(hf, tmp_path / "fp8", "blockwise")
        before, after = stored_tensors(hf), stored_tensors(tmp_path / "fp8")
        assert {name: after[name] for name in extra} == {name: before[name] for name in extra}

    @pytest.mark.parametrize("dtype", TORCH_ALONE, ids=str)
    def test_a_dtype_that_safetensors_does_not_have_is_refused(self, dtype: torch.dtype, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=f"safetensors has no dtype for 't', which is {dtype}"):
            SafetensorsFile(tmp_path / "f", {"t": info_of(dtype, (2, 3))})


@pytest.fixture
def torch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.load` cannot fill a tensor of float4, which deterministic algorithms do with new memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


class TestTorchDist:
    @by_dtype
    @pytest.mark.usefixtures("torch_itself")
    def test_what_torch_saved_is_read(self, dtype: torch.dtype, tmp_path: Path) -> None:
        tensors = {"t": _random(dtype, 6, 4), "transposed": _random(dtype, 4, 6).t(), "none": _random(dtype, 0, 4)}
        dcp.save(dict(tensors), checkpoint_id=str(tmp_path), no_dist=True)
        reader = TorchDistReader(tmp_path)
        for name, tensor in tensors.items():
            assert reader.tensors[name] == info_of(dtype, tensor.shape)
            assert torch.equal(bits(reader.read(name)), bits(tensor))
        assert torch.equal(bits(reader.read("t", (3,))), bits(tensors["t"][3]))

    @by_dtype
    @pytest.mark.usefixtures("torch_itself")
    def test_torch_reads_what_was_written(self, dtype: torch.dtype, tmp_path: Path) -> None:
        tensor = _random(dtype, 6, 4)
        write_torch_dist(tmp_path / "checkpoint", {"t": tensor})
        target = {"t": torch.zeros_like(tensor.view(torch.uint8)).view(dtype)}
        dcp.load(target, checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
        assert torch.equal(bits(target["t"]), bits(tensor))

    def test_they_are_inspected_and_compared(self, tmp_path: Path) -> None:
        a = write_torch_dist(tmp_path / "a", _every())
        b = write_torch_dist(tmp_path / "b", {name: _with_one_bit_less(t) for name, t in _every().items()})
        found = inspect_checkpoint(a)
        assert found.by_dtype.keys() == set(STORABLE)
        result = CliRunner().invoke(main, ["inspect", str(a), "--tensors"])
        assert result.exit_code == 0
        assert all(DTYPE_NAMES[dtype] in result.stdout for dtype in STORABLE)
        assert verify_checkpoints(a, a).agrees()
        report = verify_checkpoints(a, b)
        assert statuses_of(report) == dict.fromkeys(_every(), "values")
        assert all(difference.values and difference.values.count == 1 for difference in report.differences)
        assert CliRunner().invoke(main, ["verify", str(a), str(b), "--json"]).exit_code == 1

    def test_a_weight_that_is_no_floating_point_number_is_not_exported(self, tmp_path: Path) -> None:
        hf = case("Qwen3").write(tmp_path / "hf")
        import_checkpoint(hf, tmp_path / "megatron")
        reader = TorchDistReader(tmp_path / "megatron")
        tensors = {name: reader.read(name) for name in reader.tensors}
        name = "decoder.final_layernorm.weight"
        write_torch_dist(tmp_path / "trained", {**tensors, name: tensors[name].to(torch.complex64)})
        with pytest.raises(CheckpointError, match=rf"expected floating-point weights, {name} is torch\.complex64"):
            export_checkpoint(tmp_path / "trained", tmp_path / "out", source=tmp_path / "megatron")


def _compare(a: Tensor, b: Tensor) -> Comparison:
    comparison = Comparison(info_of(a.dtype, a.shape).shape)
    comparison.add(a, b)
    return comparison


class TestValues:
    def test_float4(self) -> None:
        """All pairs of codes, by the formula of E2M1: one bit of mantissa, bias 1, subnormals."""

        def value(code: int) -> float:
            sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
            return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))

        codes = [(low, high) for low in range(16) for high in range(16)]
        a = torch.tensor([low | high << 4 for low, high in codes], dtype=torch.uint8).view(DTYPES["F4"])
        b = torch.zeros(256, dtype=torch.uint8).view(DTYPES["F4"])
        result = _compare(a, b).result()
        values = [value(code) for pair in codes for code in pair]
        assert (result.total, result.count) == (512, sum(code != 0 for pair in codes for code in pair))
        assert result.first == (3,)  # the higher half of the second byte
        assert result.absolute is not None
        assert result.absolute.size == max(map(abs, values)) == 6.0
        assert result.absolute.a == values[result.absolute.index[0]]

        wide = Comparison((512,))
        wide.add(a, torch.tensor(values))
        assert wide.result().count == 0

    @pytest.mark.parametrize("name", ["F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
    def test_all_codes_of_eight_bits(self, name: str) -> None:
        a = torch.arange(256, dtype=torch.uint8).view(DTYPES[name])
        result = _compare(a, torch.full((256,), 0x41, dtype=torch.uint8).view(a.dtype)).result()
        wide = a.double()
        assert result.nan == (int(wide.isnan().sum()), 0)
        assert result.nan[0] == 1
        assert result.count == 255
        assert result.absolute is not None
        other = float(torch.tensor(0x41, dtype=torch.uint8).view(DTYPES[name]).double())
        assert result.absolute.size == float((wide - other).abs().nan_to_num(0).max())
        assert not _compare(a, a).result().count

    @pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
    def test_complex_values(self, dtype: torch.dtype) -> None:
        a = torch.tensor([1 + 2j, complex(0.0, -0.0), complex(torch.nan, 1), complex(1, torch.inf)]).to(dtype)
        b = torch.tensor([1 + 3j, complex(0.0, 0.0), complex(torch.nan, 1), complex(1, torch.inf)]).to(dtype)
        result = _compare(a, b).result()
        assert (result.count, result.total, result.first) == (2, 4, (0,))
        assert (result.nan, result.infinite) == ((1, 1), (1, 1))
        assert result.absolute is result.relative is None
        assert _compare(a[:1], a[:1].to(torch.complex128)).result().count == 0
        assert _compare(torch.tensor([1 + 0j, 1 + 1j]), torch.tensor([1.0, 1.0])).result().count == 1

    @pytest.mark.parametrize(
        ("a", "b", "count"),
        [
            (torch.tensor([2**64 - 1, 5], dtype=torch.uint64), torch.tensor([-1, 5]), 1),
            (torch.tensor([2**63, 5], dtype=torch.uint64), torch.tensor([-(2**63), 6]), 2),
            (torch.tensor([2**53 + 1, 2**53, 2**64 - 1], dtype=torch.uint64), torch.tensor([2.0**53, 2.0**53, 2e9]), 2),
            (torch.tensor([2**64 - 1], dtype=torch.uint64), torch.tensor([2.0**64]), 1),
            (torch.tensor([2**63 - 1, -(2**63)]), torch.tensor([2.0**63, -(2.0**63)]), 1),
            (torch.tensor([65535, 1], dtype=torch.uint16), torch.tensor([-1, 1], dtype=torch.int16), 1),
            (torch.tensor([2**32 - 1], dtype=torch.uint32), torch.tensor([2**32 - 1]), 0),
            (torch.tensor([2**64 - 1], dtype=torch.uint64), torch.tensor([2**64 - 1], dtype=torch.uint64), 0),
            (torch.tensor([2**64 - 1, 2], dtype=torch.uint64), torch.tensor([2**64 - 2, 2], dtype=torch.uint64), 1),
        ],
    )  # fmt: skip
    def test_unsigned_integers(self, a: Tensor, b: Tensor, count: int) -> None:
        for pair in ((a, b.double() if b.is_floating_point() else b), (b.double() if b.is_floating_point() else b, a)):
            assert _compare(*pair).result().count == count


def test_an_external_reader_agrees_on_every_dtype(tmp_path: Path) -> None:
    tensors = {name: _random(dtype, 6, 4) for name, dtype in DTYPES.items()}
    file = SafetensorsFile(tmp_path / "f", {name: info_of(t.dtype, t.shape) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        file.write(name, tensor)
    file.finish()
    for name, tensor in load_file(tmp_path / "f").items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        assert torch.equal(bits(tensor), bits(tensors[name]))
