"""Whole float8 checkpoints: made, read back, and recognized by their headers and configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fp32.checkpoint.formats.safetensors_file import read_header
from megatron_fp32.checkpoint.formats.section import to_disk
from megatron_fp32.checkpoint.fp8 import (
    detect_scheme,
    fp8_infos,
    named_scheme,
    quantization_config,
    quantize_tensor,
    scheme_from_config,
    scheme_of_tensors,
)
from megatron_fp32.checkpoint.jobs import read_back
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.errors import CheckpointError
from megatron_fp32.ops.fp8.reference import quantize_reference
from megatron_fp32.weights.tensors import TensorInfo
from tests.checkpoint.support import assets, bits, load_tensors, quantization_of, rewrite, tree
from tests.qwen3_5 import write_dense

FP8_FORMATS = ("blockwise", "channelwise", "modelopt")


SUFFIX = {"blockwise": "weight_scale_inv", "channelwise": "weight_scale", "modelopt": "weight_scale"}


by_format = pytest.mark.parametrize("format", FP8_FORMATS)


WEIGHT = TensorInfo(dtype=torch.bfloat16, shape=(256, 384))


UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_dense(tmp_path_factory.mktemp("dense") / "hf")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "more").mkdir()
    (directory / "more" / "README.md").write_bytes(b"\xff")
    return directory


@pytest.fixture(scope="session")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(format: str) -> Path:
        if format not in made:
            made[format] = tmp_path_factory.mktemp("quantized") / format
            quantize_checkpoint(dense, made[format], format)
        return made[format]

    return of


class TestDetection:
    @by_format
    def test_a_scheme_is_found_in_headers_and_in_configs(
        self, format: str, dense: Path, quantized: Callable[[str], Path], tmp_path: Path
    ) -> None:
        """Both make the same checkpoint again."""
        made = quantized(format)
        found = detect_scheme(made)
        assert (found.format, found.scale_format) == (format, named_scheme(format).scale_format)
        weights = load_tensors(made)
        assert found.modules == {n.removesuffix(".weight") for n, t in weights.items() if t.dtype.itemsize == 1}
        without = shutil.copytree(made, tmp_path / "config only", ignore=shutil.ignore_patterns("*.safetensors"))
        for i, scheme in enumerate((found, detect_scheme(without))):
            quantize_checkpoint(dense, tmp_path / str(i), scheme)
            assert tree(tmp_path / str(i)) == tree(made)

    def test_the_headers_decide_what_is_quantized(self, quantized: Callable[[str], Path], tmp_path: Path) -> None:
        """A list that does not name a module, since its rules were meant otherwise, does not matter."""
        made = shutil.copytree(quantized("blockwise"), tmp_path / "hf")
        module = "model.layers.0.mlp.up_proj"

        def keep_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            del tensors[f"{module}.weight_scale_inv"]
            return {**tensors, f"{module}.weight": tensors[f"{module}.weight"].bfloat16()}

        rewrite(made, keep_one)
        assert module not in quantization_of(made)["modules_to_not_convert"]
        modules = detect_scheme(made).modules
        assert modules is not None
        assert module not in modules
        assert "model.layers.1.mlp.up_proj" in modules

    @pytest.mark.parametrize(
        ("scale", "dtype", "format", "scale_format"),
        [
            ("a.weight_scale_inv", torch.bfloat16, "blockwise", "bf16"),
            ("a.weight_scale", torch.float32, "channelwise", "fp32"),
        ],
    )
    def test_the_dtype_of_scales_is_that_of_the_headers(
        self, scale: str, dtype: torch.dtype, format: str, scale_format: str
    ) -> None:
        shape = (2, 3) if scale.endswith("_inv") else (256, 1)
        found = scheme_of_tensors({"a.weight": F8, scale: TensorInfo(dtype=dtype, shape=shape)})
        assert (found.format, found.scale_format, found.block) == (format, scale_format, (128, 128))

    def test_blocks_and_powers_of_two_are_those_of_the_config(self) -> None:
        tensors = {f"{UP}.weight": F8, f"{UP}.weight_scale_inv": TensorInfo(dtype=torch.float32, shape=(4, 12))}
        config = {**BLOCKWISE, "weight_block_size": [64, 32], "scale_fmt": "ue8m0"}
        found = scheme_of_tensors(tensors, config)
        assert (found.block, found.scale_format) == ((64, 32), "ue8m0")
        again = quantization_config(fp8_infos({f"{UP}.weight": WEIGHT}, found), found)
        assert again == {**config, "modules_to_not_convert": ["lm_head"]}

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({}, "no weight is float8"),
            (
                {"a.weight_scale": (1,)},
                r"unknown float8 scheme: a\.weight has the shape \(256, 384\) and .* has the shape \(1,\)",
            ),
            ({"a.weight_scale": ()}, "unknown float8 scheme"),
            ({"a.weight_scale": (2, 3)}, "unknown float8 scheme"),
            ({"a.weight_scale": (2, 1, 3, 1)}, "unknown float8 scheme"),
            ({"a.weight_scale_inv": (3, 2)}, "unknown float8 scheme"),
            ({"a.weight_scale_inv": (256, 1)}, "unknown float8 scheme"),
            ({"a.scale": (2, 3)}, r"needs one scale, got \[\]"),
            ({"a.weight_scale_inv": (2, 3), "a.weight_scale": (256, 1)}, "needs one scale, got .*inv"),
            ({"a.weight_scale": (256, 1), "a.input_scale": ()}, r"static scales, such as a\.input_scale"),
        ],
    )
    def test_what_it_does_not_know_is_an_error(self, tensors: dict[str, tuple[int, ...]], message: str) -> None:
        infos = {name: TensorInfo(dtype=torch.float32, shape=shape) for name, shape in tensors.items()}
        with pytest.raises(CheckpointError, match=message):
            scheme_of_tensors({"a.weight": F8, **infos} if tensors else {"a.weight": WEIGHT})

    def test_mixtures_are_errors(self) -> None:
        def scale(*shape: int, dtype: torch.dtype = torch.float32) -> TensorInfo:
            return TensorInfo(dtype=dtype, shape=shape)

        two = {"a.weight": F8, "b.weight": F8}
        with pytest.raises(CheckpointError, match=r"unknown float8 scheme: b\.weight .*one layout for all weights"):
            scheme_of_tensors({**two, "a.weight_scale": scale(256, 1), "b.weight_scale": scale(256)})
        with pytest.raises(CheckpointError, match="all float32 or all bfloat16"):
            scheme_of_tensors({**two, "a.weight_scale": scale(256), "b.weight_scale": scale(256, dtype=torch.bfloat16)})
        fused = TensorInfo(dtype=torch.float8_e4m3fn, shape=(2, 6, 5))
        with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj"):
            scheme_of_tensors({"experts.gate_up_proj": fused, "experts.gate_up_proj_scale_inv": scale(2, 1, 1)})

    def test_a_config_that_contradicts_the_headers_is_an_error(self) -> None:
        tensors = {"a.weight": F8, "a.weight_scale": TensorInfo(dtype=torch.float32, shape=(256, 1))}
        with pytest.raises(CheckpointError, match="tensors have the format channelwise, but the config says block"):
            scheme_of_tensors(tensors, BLOCKWISE)
        with pytest.raises(CheckpointError, match="unknown quantization method 'fbgemm_fp8'"):
            scheme_of_tensors(tensors, {"quant_method": "fbgemm_fp8"})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"quant_method": "gptq"}, "unknown quantization method 'gptq'"),
            ({"weight_block_size": None}, "scales per tensor are not supported"),
            ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
            ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ],
    )
    def test_a_blockwise_config_that_it_does_not_know(self, change: dict[str, Any], message: str) -> None:
        assert scheme_from_config(BLOCKWISE).format == "blockwise"
        with pytest.raises(CheckpointError, match=message):
            scheme_from_config({**BLOCKWISE, **change})

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (("format",), "pack-quantized", "format is 'pack-quantized'"),
            (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme is"),
            (("config_groups", "group_0", "targets"), ["re:.*mlp"], "targets is"),
            (("config_groups", "group_0", "weights", "strategy"), "tensor", "strategy is 'tensor'"),
            (("config_groups", "group_0", "weights", "num_bits"), 4, "num_bits is 4"),
            (("config_groups", "group_0", "weights", "type"), "int", "type is 'int'"),
            (("config_groups", "group_0", "input_activations", "dynamic"), False, "dynamic is False"),
            (("config_groups", "group_1"), {}, r"one group of quantized modules, got \['group_0', 'group_1'\]"),
        ],
    )
    def test_a_channelwise_config_that_it_does_not_know(self, place: tuple[str, ...], value: Any, message: str) -> None:
        config = json.loads(json.dumps(quantization_config({}, named_scheme("channelwise"))))
        assert scheme_from_config(config).format == "channelwise"
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        with pytest.raises(CheckpointError, match=message):
            scheme_from_config(config)

    def test_both_forms_of_a_modelopt_config(self) -> None:
        legacy = {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": PER_CHANNEL, "exclude_modules": ["a"]},
        }
        modern = {"quant_method": "modelopt", "quant_algo": PER_CHANNEL, "ignore": ["a"]}
        assert scheme_from_config(legacy) == scheme_from_config(modern) == named_scheme("modelopt", skip=("a",))
        with pytest.raises(CheckpointError, match="quant_algo is 'NVFP4'"):
            scheme_from_config({**modern, "quant_algo": "NVFP4"})

    def test_a_directory_without_either(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="neither safetensors files nor a config"):
            detect_scheme(tmp_path)
        (tmp_path / "config.json").write_text("[")
        with pytest.raises(CheckpointError, match=r"config\.json is not a JSON"):
            detect_scheme(tmp_path)


PER_CHANNEL = "FP8_PER_CHANNEL_PER_TOKEN"


F8 = TensorInfo(dtype=torch.float8_e4m3fn, shape=(256, 384))


BLOCKWISE = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


class TestWholeCheckpoints:
    @by_format
    def test_every_value_is_the_definitions_and_all_else_is_unchanged(
        self, format: str, dense: Path, quantized: Callable[[str], Path]
    ) -> None:
        source, made = load_file(dense / "model.safetensors"), load_tensors(quantized(format))
        float8 = {name for name, t in made.items() if t.dtype == torch.float8_e4m3fn}
        scales = {name for name in made if name.endswith(SUFFIX[format])}
        assert made.keys() - scales == source.keys()
        assert {name.replace(SUFFIX[format], "weight") for name in scales} == float8
        assert len(float8) == 3 + 4 + 2 * 3  # in_proj_qkv, in_proj_z, out_proj; q, k, v, o; three of each MLP
        for name, tensor in source.items():
            if name not in float8:
                assert torch.equal(bits(made[name]), bits(tensor)), name
                assert made[name].dtype == tensor.dtype
                continue
            scale = made[name.replace("weight", SUFFIX[format])]
            block = (128, 128) if format == "blockwise" else (1, tensor.shape[1])
            codes, expected = quantize_reference(
                tensor, block, scale_format="bf16" if format == "channelwise" else "fp32"
            )
            assert torch.equal(bits(made[name]), bits(codes))
            assert torch.equal(scale.double().flatten(), expected.flatten())

    @by_format
    def test_the_config_says_how_and_other_files_are_copied(
        self, format: str, dense: Path, quantized: Callable[[str], Path]
    ) -> None:
        made = quantized(format)
        config = json.loads((made / "config.json").read_text())
        quantization = config.pop("quantization_config")
        assert config == json.loads((dense / "config.json").read_text())
        names = {"blockwise": "modules_to_not_convert", "channelwise": "ignore", "modelopt": "ignore"}
        linear = "model.layers.0.linear_attn."
        listed = ["lm_head", "model.embed_tokens", *(f"{linear}{m}" for m in ("conv1d", "in_proj_a", "in_proj_b"))]
        assert quantization[names[format]] == listed
        files = tree(made)
        expected = {k: v for k, v in tree(dense).items() if k not in ("config.json", "model.safetensors")}
        assert {name: files[name] for name in expected} == expected
        assert ("hf_quant_config.json" in files) == (format == "modelopt")

    def test_shards_hold_the_same(self, dense: Path, quantized: Callable[[str], Path], tmp_path: Path) -> None:
        quantize_checkpoint(dense, tmp_path / "out", "blockwise", max_shard_bytes=200_000)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
        a, b = load_tensors(tmp_path / "out"), load_tensors(quantized("blockwise"))
        assert a.keys() == b.keys()
        assert all(torch.equal(bits(a[name]), bits(b[name])) for name in a)
        assert detect_scheme(tmp_path / "out") == detect_scheme(quantized("blockwise"))

    def test_the_report_and_the_progress_count_what_is_written(self, dense: Path, tmp_path: Path) -> None:
        calls: list[tuple[str, int, int]] = []
        report = quantize_checkpoint(dense, tmp_path / "out", "modelopt", progress=lambda *a: calls.append(a))
        made = load_tensors(tmp_path / "out")
        total = sum(t.nbytes for t in made.values())
        assert report.nbytes == total
        assert {call[2] for call in calls} == {total}
        assert sum(n for action, n, _ in calls if action == "write") == total
        assert sum(n for action, n, _ in calls if action == "verify") == total
        assert set(report.quantized) == {n for n, t in made.items() if t.dtype.itemsize == 1}
        assert set(report.unchanged) == {
            n for n in made if n not in report.quantized and not n.endswith("weight_scale")
        }
        assert report.directory == tmp_path / "out"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t: {**t, "model.layers.0.mlp.up_proj.weight": torch.full((384, 256), torch.inf)},
                "up_proj.weight: inf",
            ),
            (lambda t: {"lm_head.weight": t["lm_head.weight"]}, "a weight that the blockwise scheme quantizes"),
            (lambda t: {**t, "a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, "quantized already: a.weight"),
        ],
    )
    def test_what_cannot_be_quantized_leaves_nothing_behind(
        self, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, dense: Path, tmp_path: Path
    ) -> None:
        source = rewrite(shutil.copytree(dense, tmp_path / "hf"), change)
        with pytest.raises(ValueError, match=message):
            quantize_checkpoint(source, tmp_path / "out", "blockwise")
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    def test_a_quantized_source_and_an_existing_target_are_refused(
        self, dense: Path, quantized: Callable[[str], Path], tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError, match="is quantized already: compressed-tensors"):
            quantize_checkpoint(quantized("channelwise"), tmp_path / "out", "blockwise")
        (tmp_path / "out").mkdir()
        with pytest.raises(CheckpointError, match="exists already"):
            quantize_checkpoint(dense, tmp_path / "out", "blockwise")
        assert assets(tmp_path / "out") == {}
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match=r"no config\.json in"):
            quantize_checkpoint(tmp_path / "empty", tmp_path / "new", "blockwise")

    def test_a_disk_that_forgets_is_noticed(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def damaging(path: Path) -> None:
            to_disk(path)
            with path.open("r+b") as stream:
                stream.seek(read_header(path).starts["model.layers.1.mlp.up_proj.weight"] + 5)
                stream.write(b"\x01")

        monkeypatch.setattr(read_back, "to_disk", damaging)
        with pytest.raises(
            CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has other values on the disk"
        ):
            quantize_checkpoint(dense, tmp_path / "out", "blockwise")
        assert not (tmp_path / "out").exists()


def test_a_safetensors_file_of_zeros_has_the_producers_scales(tmp_path: Path) -> None:
    """compressed-tensors: the smallest step of the scale's dtype; the others: 1."""
    expected = {"blockwise": 1.0, "channelwise": 2.0**-7, "modelopt": 1.0}
    for format, scale in expected.items():
        got = quantize_tensor(f"{UP}.weight", torch.zeros(4, 8), named_scheme(format))
        save_file(got, tmp_path / f"{format}.safetensors")
        stored = load_file(tmp_path / f"{format}.safetensors")
        assert (stored[f"{UP}.{SUFFIX[format]}"].float() == scale).all()
        assert not bits(stored[f"{UP}.weight"]).any()
