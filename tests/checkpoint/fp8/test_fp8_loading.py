"""Which modules transformers builds for float8: every one of them must find its scales, and no scale be left over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from megatron_fp32 import cli
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.fp8 import named_scheme, scheme_from_config
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.ops.fp8.reference import dequantize_reference
from megatron_fp32.testing.qwen3_5 import write_qwen3_5
from tests.checkpoint.support import load_tensors, quantization_of, rewrite
from tests.families import case
from tests.qwen3_5 import BLOCKS

pytest.importorskip("accelerate")  # transformers loads float8 with it
pytest.importorskip("compressed_tensors")

FP8_FORMATS = ("blockwise", "channelwise", "modelopt")
ALONE = (
    "Llama, tied",
    "Qwen3-MoE, a dense layer",
    "Qwen3-Next",
    "Qwen3-Next, plain probabilities, tied, a dense layer",
    "Qwen3.5, tied",
    "Qwen3.5-MoE",
    "Qwen3.5-MoE, tied",
)
INSIDE = ("Qwen3.5-VL", "Qwen3.5-VL-MoE")
"""Vision-language models whose text model transformers loads alone, too."""

Quantized = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """`quantized(case, format)`, written once for the whole run."""
    root = tmp_path_factory.mktemp("loading")

    def of(name: str, format: str) -> Path:
        hf, place = root / name / "hf", root / name / format
        if not hf.exists():
            case(name).write(hf)
        if not place.exists():
            quantize_checkpoint(hf, place, format)
        return place

    return of


@pytest.fixture
def _float8_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers builds float8 modules on the CPU, too, instead of dequantizing."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)


def loaded(auto_class: str, directory: Path) -> Any:
    """The model, after every tensor has found its place and none has had to be made up."""
    import transformers

    model, report = getattr(transformers, auto_class).from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    return model


def float8_modules(directory: Path) -> set[str]:
    return {n.removesuffix(".weight") for n, t in load_tensors(directory).items() if t.dtype == torch.float8_e4m3fn}


@pytest.mark.usefixtures("_float8_without_a_gpu")
class TestTransformers:
    @pytest.mark.parametrize("format", FP8_FORMATS[:2])
    @pytest.mark.parametrize("name", [*ALONE, *INSIDE])
    def test_a_text_model_lacks_nothing(self, name: str, format: str, quantized: Quantized) -> None:
        """Of a vision-language checkpoint `AutoModelForCausalLM` builds the text model, under names of its own."""
        model = loaded("AutoModelForCausalLM", quantized(name, format))
        assert type(model).__name__.endswith("ForCausalLM")
        dtypes = {parameter.dtype for parameter in model.parameters()}
        assert torch.float8_e4m3fn in dtypes

    @pytest.mark.parametrize("format", FP8_FORMATS[:2])
    @pytest.mark.parametrize("name", ["Qwen3-VL", *INSIDE])
    def test_a_vision_language_model_lacks_nothing(self, name: str, format: str, quantized: Quantized) -> None:
        loaded("AutoModelForImageTextToText", quantized(name, format))

    @pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForImageTextToText"])
    def test_an_export_from_megatron_lacks_nothing(self, auto_class: str, tmp_path: Path) -> None:
        import_checkpoint(case(INSIDE[1]).write(tmp_path / "hf"), tmp_path / "megatron", vision="carry")
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", fp8=named_scheme("blockwise"))
        loaded(auto_class, tmp_path / "out")

    def test_experts_that_a_list_keeps_lack_nothing(self, tmp_path: Path) -> None:
        """transformers builds all experts of a layer as one module, which must be listed then."""
        hf = case("Qwen3.5-MoE").write(tmp_path / "hf")
        scheme = named_scheme("blockwise", skip=(r"model\.layers\.[01]\.mlp\.experts",))
        quantize_checkpoint(hf, tmp_path / "out", scheme)
        listed = quantization_of(tmp_path / "out")["modules_to_not_convert"]
        assert [name for name in listed if name.startswith("model.") and name.endswith(".experts")] == [
            "model.layers.0.mlp.experts",
            "model.layers.1.mlp.experts",
        ]
        model = loaded("AutoModelForCausalLM", tmp_path / "out")
        dtypes = [layer.mlp.experts.gate_up_proj.dtype for layer in model.model.layers]
        assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("format", FP8_FORMATS)
@pytest.mark.parametrize("name", [*ALONE, *INSIDE])
def test_a_list_names_what_is_kept_and_nothing_that_is_quantized(name: str, format: str, quantized: Quantized) -> None:
    """By the rules of whoever reads the list, under both names of a text model inside of another one."""
    directory = quantized(name, format)
    scheme, float8 = scheme_from_config(quantization_of(directory)), float8_modules(directory)
    weights = {n.removesuffix(".weight"): t for n, t in load_tensors(directory).items() if n.endswith(".weight")}
    kept = {module for module, weight in weights.items() if weight.ndim > 1}
    for modules, skipped in ((float8, False), (kept - float8, True), ({"lm_head"}, True)):
        for module in modules:
            for called in {module, re.sub(r"^model\.language_model\.", "model.", module)}:
                assert scheme.skips(called) == skipped, called


@pytest.mark.parametrize("head", ["score", "v_head", "value_head", "qa_outputs", "classifier", "v_head.summary"])
@pytest.mark.parametrize("format", FP8_FORMATS)
def test_a_head_under_another_name_keeps_its_bytes(head: str, format: str, tmp_path: Path) -> None:
    def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**{n: t for n, t in tensors.items() if n != "lm_head.weight"}, f"{head}.weight": weight}

    weight = torch.randn(1, 36).bfloat16()
    hf = rewrite(case("Qwen3").write(tmp_path / "hf"), with_head)
    quantize_checkpoint(hf, tmp_path / "out", format)
    assert torch.equal(load_tensors(tmp_path / "out")[f"{head}.weight"], weight)
    config = quantization_of(tmp_path / "out")
    assert head in config.get("modules_to_not_convert", config.get("ignore"))


@pytest.mark.usefixtures("_float8_without_a_gpu")
def test_transformers_reads_a_sequence_classifier(tmp_path: Path) -> None:
    from transformers import Qwen3ForSequenceClassification

    Qwen3ForSequenceClassification(case("Qwen3").text_config()).bfloat16().save_pretrained(tmp_path / "hf")
    quantize_checkpoint(tmp_path / "hf", tmp_path / "out", "blockwise")
    loaded("AutoModelForSequenceClassification", tmp_path / "out")


class TestPartialBlocks:
    """A last block of fewer rows or columns."""

    FEW = {**BLOCKS, "intermediate_size": 192}

    def test_are_named_and_are_what_transformers_reads_by_other_blocks(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM, FineGrainedFP8Config

        def no_two_blocks_alike(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: ramp(t) if n.endswith("proj.weight") else t for n, t in tensors.items()}

        hf = rewrite(write_qwen3_5(tmp_path / "hf", **self.FEW), no_two_blocks_alike)
        report = quantize_checkpoint(hf, tmp_path / "out", "blockwise")
        option = FineGrainedFP8Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=option)
        stored, parameters = load_tensors(tmp_path / "out"), dict(model.named_parameters())
        wrong = [
            name
            for name in report.quantized
            if not torch.equal(parameters[name].double(), meant(stored, name).bfloat16().double())
        ]
        assert sorted(wrong) == sorted(report.partial_blocks)
        assert len(wrong) == 6  # gate, up and down of two layers

    @pytest.mark.parametrize("format", FP8_FORMATS)
    def test_are_in_the_text_and_the_json_of_blockwise_checkpoints_alone(self, format: str, tmp_path: Path) -> None:
        def run(*args: Path | str) -> str:
            result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
            assert result.exit_code == 0, result.output
            return result.stdout

        hf = write_qwen3_5(tmp_path / "hf", **self.FEW)
        run("import", hf, tmp_path / "megatron")
        texts = [
            run("quantize", hf, tmp_path / "a", "--scheme", format),
            run("export", tmp_path / "megatron", tmp_path / "b", "--fp8", format),
        ]
        reports = [
            json.loads(run("quantize", "--json", hf, tmp_path / "c", "--scheme", format)),
            json.loads(run("export", "--json", tmp_path / "megatron", tmp_path / "d", "--fp8", format)),
        ]
        count = 6 if format == "blockwise" else 0
        assert [len(report["partial_blocks"]) for report in reports] == [count, count]
        for text in texts:
            assert ("warning: 6 float8 weights" in text) == ("mlp.up_proj" in text) == (count > 0)

    def test_are_not_where_blocks_are_full(self, tmp_path: Path) -> None:
        report = quantize_checkpoint(write_qwen3_5(tmp_path / "hf", **BLOCKS), tmp_path / "out", "blockwise")
        assert report.partial_blocks == ()


def ramp(weight: Tensor) -> Tensor:
    rows, columns = (torch.linspace(1, 4, size) for size in weight.shape)
    return (weight.float() * rows[:, None] * columns).to(weight.dtype)


def meant(stored: dict[str, Tensor], name: str) -> Tensor:
    return dequantize_reference(stored[name].view(torch.uint8), stored[f"{name}_scale_inv"], (128, 128))
