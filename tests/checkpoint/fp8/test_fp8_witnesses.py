"""float8 checkpoints in the hands of those who made the formats: transformers and compressed-tensors, on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_fp32.checkpoint.fp8 import named_scheme
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.ops.fp8 import quantize_channelwise
from megatron_fp32.ops.fp8.reference import dequantize_reference
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.testing.qwen3_5 import load_qwen3_5
from tests.checkpoint.support import load_tensors, quantization_of
from tests.qwen3_5 import MOE_FAMILIES, moe_class, write_dense, write_moe

pytest.importorskip("accelerate")  # transformers loads float8 with it
pytest.importorskip("compressed_tensors")

Made = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(model, format)`, a float8 checkpoint; format "hf" is its source. Experts are fused in the source."""
    root = tmp_path_factory.mktemp("witnesses")

    def of(model: str, format: str) -> Path:
        place = root / model / format
        if not place.exists():
            if format == "hf":
                write_dense(place) if model == "dense" else write_moe(place, model, fused=model == "qwen3_5_moe")
            else:
                quantize_checkpoint(of(model, "hf"), place, format)
        return place

    return of


def dequantized(directory: Path) -> dict[str, Tensor]:
    """Every tensor as its definition says, in float64."""
    tensors = load_tensors(directory)
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors.get(f"{name}_scale_inv", tensors.get(f"{name}_scale"))
            block = (128, 128) if f"{name}_scale_inv" in tensors else (1, tensor.shape[1])
            found[name] = dequantize_reference(tensor.view(torch.uint8), scale, block)
        elif "weight_scale" not in name:
            found[name] = tensor.double()
    return found


def load(model_class: Any, directory: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    model, report = model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def dequantize_option(format: str) -> dict[str, Any]:
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config

    config = FineGrainedFP8Config if format == "blockwise" else CompressedTensorsConfig
    return {"quantization_config": config(dequantize=True)}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.float()(torch.arange(150).view(3, 50)).logits.double()


@pytest.mark.parametrize("format", ["blockwise", "channelwise"])
def test_transformers_dequantizes_what_was_meant(format: str, made: Made) -> None:
    """Each weight is the exact product, rounded to bfloat16 once, and the logits are as near as the format allows."""
    from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

    model = load(Qwen3_5ForCausalLM, made("dense", format), torch.bfloat16, **dequantize_option(format))
    meant = dequantized(made("dense", format))
    parameters = dict(model.named_parameters())
    assert parameters.keys() == meant.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.double(), meant[name].to(parameter.dtype).double()), name

    original = load_qwen3_5(made("dense", "hf"), torch.bfloat16)
    truth = logits(original)
    error = relative_error(logits(model), truth)
    # As far off as weights are when each is moved by up to half a unit in its last of 4 bits, at random.
    torch.manual_seed(0)
    noisy = load_qwen3_5(made("dense", "hf"), torch.bfloat16).float()
    with torch.no_grad():
        for name, parameter in noisy.named_parameters():
            if any(f"{name}_scale{end}" in load_tensors(made("dense", format)) for end in ("", "_inv")):
                parameter.mul_(1 + torch.empty_like(parameter).uniform_(-(2.0**-4), 2.0**-4))
    assert 0 < error < 1.3 * relative_error(logits(noisy), truth)


@pytest.mark.parametrize("format", ["blockwise", "channelwise"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_transformers_finds_every_expert(family: str, format: str, made: Made) -> None:
    model = load(moe_class(family)[1], made(family, format), torch.bfloat16, **dequantize_option(format))
    meant = dequantized(made(family, format))
    experts = {name: p for name, p in model.named_parameters() if ".experts." in name}
    assert len(experts) == 4
    for name, parameter in experts.items():
        prefix, kind = name.rsplit(".", 1)
        for expert in range(len(parameter)):
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            expected = torch.cat([meant[f"{prefix}.{expert}.{part}.weight"] for part in kinds])
            assert torch.equal(parameter[expert], expected.bfloat16()), (name, expert)


def test_transformers_runs_a_channelwise_checkpoint_compressed(made: Made) -> None:
    """compressed-tensors chooses the modules by the config, and rounds activations as in inference."""
    from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

    model = load(Qwen3_5ForCausalLM, made("dense", "channelwise"), torch.bfloat16)
    stored = load_tensors(made("dense", "channelwise"))
    parameters = dict(model.named_parameters())
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        assert torch.equal(parameters[name].view(torch.uint8), stored[name].view(torch.uint8))
        assert torch.equal(parameters[f"{name}_scale"], stored[f"{name}_scale"])
    truth = logits(load_qwen3_5(made("dense", "hf"), torch.bfloat16))
    with torch.no_grad():
        error = relative_error(model(torch.arange(150).view(3, 50)).logits.double(), truth)
    option = dequantize_option("channelwise")
    dense = load(Qwen3_5ForCausalLM, made("dense", "channelwise"), torch.bfloat16, **option)
    # Activations are rounded as coarsely as weights.
    assert error < 2 * relative_error(logits(dense), truth)


class TestCompressedTensors:
    def test_decompresses_every_module(self, made: Made) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig.model_validate(quantization_of(made("dense", "channelwise")))
        (scheme,) = config.config_groups.values()
        compressor = BaseCompressor.get_value_from_registry(config.format)
        stored, meant = load_tensors(made("dense", "channelwise")), dequantized(made("dense", "channelwise"))
        modules = [name.removesuffix("_scale") for name in stored if name.endswith("weight_scale")]
        assert len(modules) == 13
        for name in modules:
            state = {"weight": stored[name], "weight_scale": stored[f"{name}_scale"]}
            got = compressor.decompress(state, scheme)["weight"]
            assert torch.equal(got, meant[name].to(torch.bfloat16))

    def test_its_own_scales_differ_by_a_rounding_and_its_weights_hardly(self) -> None:
        """It divides every weight, in the weight's dtype; zeros have the same scale."""
        from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
        from compressed_tensors.quantization.quant_scheme import FP8_DYNAMIC
        from compressed_tensors.quantization.utils import calculate_qparams

        args = FP8_DYNAMIC["weights"]
        weight = torch.randn(64, 256)
        weight[3] = 0
        for scale_format, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            values = weight.to(dtype)
            scale, _ = calculate_qparams(values.amin(1, keepdim=True), values.amax(1, keepdim=True), args)
            zero_scale = float(torch.finfo(dtype).eps)
            ours = quantize_channelwise(values, scale_format=scale_format, zero_scale=zero_scale)
            assert ours.scale.dtype == scale.dtype
            assert torch.equal(ours.scale[3], scale[3])
            # Both are amax / 448 rounded once.
            assert torch.equal(ours.scale, scale)
            theirs = dequantize(quantize(values, scale, None, args, torch.float8_e4m3fn), scale, None, args)
            mine = dequantize(ours.weight, ours.scale, None, args)
            assert relative_error(mine, values) < 1.001 * relative_error(theirs, values)


def test_the_blockwise_config_is_transformers_own(made: Made) -> None:
    from transformers import FineGrainedFP8Config

    config = quantization_of(made("dense", "blockwise"))
    parsed = FineGrainedFP8Config.from_dict(config)
    assert (parsed.weight_block_size, parsed.scale_fmt, parsed.activation_scheme) == ([128, 128], "float", "dynamic")
    assert parsed.modules_to_not_convert == config["modules_to_not_convert"]


_modules = st.lists(st.sampled_from(["model", "layers", "1", "11", "mlp", "gate", "gate_proj", "up"]), min_size=1).map(
    ".".join
)
_entries = st.lists(st.sampled_from(["model", "layers", "1", "mlp", "gate", "*", ".*", "up"]), min_size=1).map(".".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(module=_modules, entry=_entries)
@example(module="model.layers.1.mlp.gate_proj", entry="model.layers.1.mlp.gate")
@example(module="model.layers.11.mlp", entry="model.layers.1")
@example(module="model.layers.11.mlp", entry="mlp")
def test_lists_are_read_as_their_producers_read_them(module: str, entry: str) -> None:
    from compressed_tensors.utils.match import match_name
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert named_scheme("channelwise", skip=(entry,)).skips(module) == match_name(module, entry)
    try:
        re.compile(entry)
    except re.error:
        with pytest.raises(ValueError, match="not a regular expression"):
            named_scheme("blockwise", skip=(entry,))
        return
    assert named_scheme("channelwise", skip=(f"re:{entry}",)).skips(module) == match_name(module, f"re:{entry}")
    assert named_scheme("blockwise", skip=(entry,)).skips(module) != should_convert_module(module, [entry])
