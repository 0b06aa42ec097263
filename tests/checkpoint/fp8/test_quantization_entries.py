"""A config that speaks of a quantization that the weights do not have: reported, and in no output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from megatron_fp32 import cli
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.fp8 import detect_scheme, named_scheme
from megatron_fp32.checkpoint.fp8.detect import read_quantization_config
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.errors import CheckpointError
from tests.checkpoint.support import assets, rewrite, stored_tensors
from tests.qwen3_5 import write_small

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
OTHER_FILES = (
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quant_model_description.json",
    "recipe.yaml",
)
FP8_FORMATS = ("blockwise", "channelwise", "modelopt")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("entries") / "hf", released_names=True)


@pytest.fixture
def claiming(plain: Path, tmp_path: Path) -> Path:
    """16-bit weights under everything that says otherwise."""
    directory = shutil.copytree(plain, tmp_path / "claiming")
    config = read(directory)
    config["quantization_config"] = FP8
    config["compression_config"] = {"quant_method": "compressed-tensors"}
    config["text_config"]["quantization_config"] = FP8
    config["vision_config"]["quantization"] = {"bits": 4}
    config["others"] = [{"a": 1}, {"quantization_config": {}}]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}, "quantization": {}}')
    for name in OTHER_FILES:
        (directory / name).write_text("{}")
    return directory


ENTRIES = {
    "config.json: quantization_config",
    "config.json: compression_config",
    "config.json: text_config.quantization_config",
    "config.json: vision_config.quantization",
    "config.json: others.1.quantization_config",
    "hf_quant_config.json",
    *OTHER_FILES,
}


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def every_key(content: Any) -> set[str]:
    if isinstance(content, dict):
        return {*content, *(key for value in content.values() for key in every_key(value))}
    return {key for value in content for key in every_key(value)} if isinstance(content, list) else set()


class TestBf16:
    def test_an_export_has_none_of_it_and_both_reports_do(self, claiming: Path, plain: Path, tmp_path: Path) -> None:
        there = import_checkpoint(claiming, tmp_path / "megatron", vision="carry")
        back = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
        assert set(there.quantization_entries) == set(back.quantization_entries) == ENTRIES
        assert read(tmp_path / "out") == {**read(plain), "others": [{"a": 1}, {}]}
        assert not every_key(read(tmp_path / "out")) & {"quantization_config", "compression_config", "quantization"}
        assert assets(tmp_path / "out").keys() == assets(plain).keys()
        assert stored_tensors(tmp_path / "out") == stored_tensors(plain)
        # The sidecar has the source as it came.
        assert assets(tmp_path / "megatron" / "hf_source" / "assets") == assets(claiming)

    def test_a_config_without_it_keeps_its_bytes(self, plain: Path, tmp_path: Path) -> None:
        own = shutil.copytree(plain, tmp_path / "own")
        (own / "config.json").write_text(json.dumps({**read(plain), "quantization_config": None}, indent=7))
        there = import_checkpoint(own, tmp_path / "megatron", text_only=True)
        back = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
        assert there.quantization_entries == back.quantization_entries == ()
        assert assets(tmp_path / "out") == assets(own)

    def test_the_commands_say_so(self, claiming: Path, tmp_path: Path) -> None:
        def run(*args: Path | str) -> str:
            result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
            assert result.exit_code == 0, result.output
            return result.stdout

        there = run("import", "--text-only", claiming, tmp_path / "megatron")
        back = run("export", tmp_path / "megatron", tmp_path / "out")
        report = json.loads(run("export", "--json", tmp_path / "megatron", tmp_path / "again"))
        assert set(report["quantization_entries"]) == ENTRIES
        for text in (there, back):
            assert [entry for entry in ENTRIES if entry not in text] == []


@pytest.mark.parametrize("format", FP8_FORMATS)
def test_a_float8_export_tells_of_its_own_format(format: str, claiming: Path, plain: Path, tmp_path: Path) -> None:
    import_checkpoint(claiming, tmp_path / "megatron", text_only=True)
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "out", fp8=named_scheme(format))
    assert set(report.quantization_entries) == ENTRIES
    own = {"hf_quant_config.json"} if format == "modelopt" else set()
    assert assets(tmp_path / "out").keys() == assets(plain).keys() | own
    config = read(tmp_path / "out")
    assert detect_scheme(tmp_path / "out").format == format
    del config["quantization_config"], config["others"]
    assert config == read(plain)


class TestQuantize:
    @pytest.mark.parametrize(
        "place",
        ["quantization_config", "compression_config", "text_config", "hf_quant_config.json", *OTHER_FILES[:-1]],
    )
    def test_says_that_the_config_contradicts_the_tensors(self, place: str, plain: Path, tmp_path: Path) -> None:
        own, config = shutil.copytree(plain, tmp_path / "own"), read(plain)
        if place.endswith(".json"):
            (own / place).write_text(json.dumps(FP8))
        elif place == "text_config":
            config[place]["quantization_config"] = FP8
        else:
            config[place] = FP8
        (own / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=rf"{place}.* contradicts the tensors: they are BF16 and F32"):
            quantize_checkpoint(own, tmp_path / "out", "blockwise")
        assert not (tmp_path / "out").exists()

    def test_leaves_the_recipe_of_another_quantization_out(self, plain: Path, tmp_path: Path) -> None:
        own = shutil.copytree(plain, tmp_path / "own")
        (own / "recipe.yaml").write_text("quant_stage: {}")
        report = quantize_checkpoint(own, tmp_path / "out", "blockwise")
        assert report.quantization_entries == ("recipe.yaml",)
        assert assets(tmp_path / "out").keys() == assets(plain).keys()

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("a.weight", torch.float8_e5m2), ("a.qweight", torch.int32), ("a.weight", torch.int8)],
    )
    def test_what_is_quantized_is_named_with_its_method(
        self, name: str, dtype: torch.dtype, plain: Path, tmp_path: Path
    ) -> None:
        own = shutil.copytree(plain, tmp_path / "own")
        (own / "config.json").write_text(json.dumps({**read(plain), "quantization_config": {"quant_method": "gptq"}}))
        rewrite(own, lambda tensors: {**tensors, name: torch.zeros(2, 2).to(dtype)})
        with pytest.raises(CheckpointError, match=rf"is quantized already: gptq, {name} is torch"):
            quantize_checkpoint(own, tmp_path / "out", "blockwise")

    def test_buffers_of_other_dtypes_are_no_quantization(self, plain: Path, tmp_path: Path) -> None:
        own = shutil.copytree(plain, tmp_path / "own")
        buffers = {"a.mask": torch.ones(3, dtype=torch.bool), "a.position_ids": torch.arange(3)}
        rewrite(own, lambda tensors: {**tensors, **buffers})
        quantize_checkpoint(own, tmp_path / "out", "blockwise")
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(stored[name], tensor) for name, tensor in buffers.items())


def test_the_older_name_of_a_config_is_read(tmp_path: Path) -> None:
    for config in ({"compression_config": FP8}, {"text_config": {"compression_config": FP8}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_quantization_config(tmp_path) == FP8
        assert detect_scheme(tmp_path) == named_scheme("blockwise")
