"""Names, lists of modules, detection and whole checkpoints in float8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32.checkpoint.fp8 import (
    Fp8Scheme,
    expert_parts,
    fp8_infos,
    is_quantized,
    named_scheme,
    quantize_tensor,
)
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.errors import CheckpointError
from megatron_fp32.ops.fp8.reference import quantize_reference
from megatron_fp32.weights.tensors import TensorInfo
from tests.checkpoint.support import bits, load_tensors, quantization_of
from tests.qwen3_5 import MOE, MOE_FAMILIES, write_moe

FP8_FORMATS = ("blockwise", "channelwise", "modelopt")
SUFFIX = {"blockwise": "weight_scale_inv", "channelwise": "weight_scale", "modelopt": "weight_scale"}
by_format = pytest.mark.parametrize("format", FP8_FORMATS)
WEIGHT = TensorInfo(dtype=torch.bfloat16, shape=(256, 384))
UP, DOWN_PROJ = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


class TestWhichTensors:
    @pytest.mark.parametrize(
        "module",
        [
            "lm_head",
            "model.embed_tokens",
            "model.language_model.embed_tokens",
            "model.norm",
            "model.layers.3.input_layernorm",
            "model.layers.3.self_attn.q_norm",
            "model.layers.3.linear_attn.norm",
            "model.layers.3.linear_attn.conv1d",
            "model.layers.3.linear_attn.in_proj_a",
            "model.layers.3.linear_attn.in_proj_b",
            "model.layers.3.linear_attn.in_proj_ba",
            "model.layers.3.linear_attn.A_log",
            "model.layers.3.linear_attn.dt_bias",
            "model.layers.3.mlp.gate",
            "model.layers.3.mlp.router",
            "model.layers.3.mlp.shared_expert_gate",
            "model.visual.blocks.0.attn.qkv",
            "model.visual.layers.0.self_attn.q_proj",
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
            "audio_tower.layers.0.self_attn.q_proj",
            "model.multi_modal_projector.up_proj",
            "mtp.fc",
            "mtp.pre_fc_norm_hidden",
            "mtp.shared_head.head",
            "model.layers.61.eh_proj",
            "model.layers.61.shared_head.head",
            # Heads under other names.
            "score",
            "score.0",
            "v_head",
            "v_head.summary",
            "value_head",
            "reward_head.out_proj",
            "qa_outputs",
            "classifier",
            "classifier.out_proj",
            "regression_head.layers.0.mlp.up_proj",
            # Nobody knows what these are.
            "a",
            "up_proj",
            "model.layers.3.mlp.up_proj.lora_A",
            "model.layers.3.self_attn.indexer.weights_proj",
            "model.layers.3.mamba.dt_proj",
        ],
    )
    @by_format
    def test_what_is_never_quantized(self, module: str, format: str) -> None:
        """Whatever the scheme says, a 2-D weight though it be."""
        exactly = Fp8Scheme(format=format, scale_format="fp32", modules=frozenset({module}))  # type: ignore[arg-type]
        assert not is_quantized(f"{module}.weight", WEIGHT, named_scheme(format))
        assert not is_quantized(f"{module}.weight", WEIGHT, exactly)
        with pytest.raises(CheckpointError, match=rf"never quantized here: \['{module}.weight'\]"):
            fp8_infos({f"{module}.weight": WEIGHT}, exactly)

    @pytest.mark.parametrize(
        "module",
        [
            "model.layers.3.self_attn.q_proj",
            "model.layers.3.self_attn.o_proj",
            "model.layers.3.linear_attn.in_proj_qkv",
            "model.layers.3.linear_attn.in_proj_z",
            "model.layers.3.linear_attn.in_proj_qkvz",
            "model.layers.3.linear_attn.out_proj",
            "model.layers.3.mlp.gate_proj",
            "model.layers.3.mlp.shared_expert.gate_proj",
            "model.layers.3.mlp.experts.17.up_proj",
            "model.layers.3.self_attn.kv_a_proj_with_mqa",
            "model.layers.3.mlp.shared_experts.down_proj",
            "model.language_model.layers.3.self_attn.v_proj",
            "language_model.model.layers.3.self_attn.v_proj",
            "mtp.layers.0.self_attn.k_proj",
        ],
    )
    @by_format
    def test_what_is_quantized(self, module: str, format: str) -> None:
        scheme = named_scheme(format)
        assert is_quantized(f"{module}.weight", WEIGHT, scheme)
        assert not is_quantized(f"{module}.bias", WEIGHT, scheme)
        for info in (
            TensorInfo(dtype=torch.bfloat16, shape=(256,)),
            TensorInfo(dtype=torch.bfloat16, shape=(4, 256, 256)),
            TensorInfo(dtype=torch.int32, shape=(256, 256)),
            TensorInfo(dtype=torch.float8_e4m3fn, shape=(256, 256)),
        ):
            assert not is_quantized(f"{module}.weight", info, scheme)

    @pytest.mark.parametrize(
        ("format", "entry", "skipped", "kept"),
        [
            # transformers: from the start up to a boundary, as a regular expression, or as a suffix.
            ("blockwise", "model.layers.1", ["model.layers.1.a.q"], ["model.layers.11.a.q", "x.model.layers.1.a.q"]),
            ("blockwise", "model.layers.*.a", ["model.layers.4.a.q"], ["model.layers.4.ab.q"]),
            ("blockwise", "up", ["model.layers.1.up", "model.layers.1.gate_up"], ["model.layers.1.up.x"]),
            # compressed-tensors: exactly, or a regular expression from the start.
            ("channelwise", "model.layers.1", ["model.layers.1"], ["model.layers.1.a.q"]),
            ("channelwise", "up", ["up"], ["model.layers.1.up"]),
            ("channelwise", "re:.*up$", ["model.layers.1.up"], ["model.layers.1.up.x"]),
            ("channelwise", "re:model", ["model.layers.1.up"], ["a.model"]),
            # vLLM's reading of ModelOpt: a wildcard for the whole name, or any part of it.
            ("modelopt", "model.layers.1*", ["model.layers.1.a.q", "model.layers.11.a.q"], ["x.model.layers.1"]),
            ("modelopt", "*.up", ["model.layers.1.up"], ["model.layers.1.up.x"]),
            ("modelopt", "a.q", ["model.layers.1.a.q_proj"], ["model.layers.1.a_q"]),
        ],
    )
    def test_a_list_is_read_by_its_producers_rules(
        self, format: str, entry: str, skipped: list[str], kept: list[str]
    ) -> None:
        scheme = named_scheme(format, skip=("other", entry))
        assert [scheme.skips(module) for module in skipped] == [True] * len(skipped)
        assert [scheme.skips(module) for module in kept] == [False] * len(kept)

    @by_format
    def test_what_a_list_names_keeps_its_dtype(self, format: str) -> None:
        scheme = named_scheme(format, skip=(UP,))
        assert not is_quantized(f"{UP}.weight", WEIGHT, scheme)
        assert is_quantized(f"{DOWN_PROJ}.weight", WEIGHT, scheme)

    def test_modules_of_a_checkpoint_decide_alone(self) -> None:
        scheme = Fp8Scheme(format="blockwise", scale_format="fp32", skip=(UP,), modules=frozenset({UP}))
        assert is_quantized(f"{UP}.weight", WEIGHT, scheme)
        assert not is_quantized(f"{DOWN_PROJ}.weight", WEIGHT, scheme)


class TestNamesAndShapes:
    @pytest.mark.parametrize(
        ("format", "scale", "shape", "dtype"),
        [
            ("blockwise", f"{UP}.weight_scale_inv", (2, 3), torch.float32),
            ("channelwise", f"{UP}.weight_scale", (200, 1), torch.bfloat16),
            ("modelopt", f"{UP}.weight_scale", (200,), torch.float32),
        ],
    )
    def test_of_each_format(self, format: str, scale: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        weight = torch.randn(200, 300).bfloat16()
        infos = fp8_infos({f"{UP}.weight": info_of(weight), f"{UP}.bias": info_of(weight[0])}, named_scheme(format))
        assert infos == {
            f"{UP}.weight": TensorInfo(dtype=torch.float8_e4m3fn, shape=(200, 300)),
            scale: TensorInfo(dtype=dtype, shape=shape),
            f"{UP}.bias": TensorInfo(dtype=torch.bfloat16, shape=(300,)),
        }
        got = quantize_tensor(f"{UP}.weight", weight, named_scheme(format))
        assert {name: info_of(t) for name, t in got.items()} == {n: infos[n] for n in (f"{UP}.weight", scale)}
        block = (128, 128) if format == "blockwise" else (1, 300)
        codes, scales = quantize_reference(weight, block, scale_format="bf16" if format == "channelwise" else "fp32")
        assert torch.equal(bits(got[f"{UP}.weight"]), bits(codes))
        assert torch.equal(got[scale].double().flatten(), scales.flatten())

    @pytest.mark.parametrize("scale_format", ["bf16", "ue8m0"])
    def test_of_other_scales_and_blocks(self, scale_format: Any) -> None:
        scheme = Fp8Scheme(format="blockwise", scale_format=scale_format, block=(32, 64))
        weight = torch.randn(70, 130)
        got = quantize_tensor(f"{UP}.weight", weight, scheme)
        assert {n: info_of(t) for n, t in got.items()} == fp8_infos({f"{UP}.weight": info_of(weight)}, scheme)
        codes, scales = quantize_reference(weight, (32, 64), scale_format=scale_format)
        assert torch.equal(bits(got[f"{UP}.weight"]), bits(codes))
        assert torch.equal(got[f"{UP}.weight_scale_inv"].double(), scales)

    def test_what_is_not_quantized_is_the_same_tensor(self) -> None:
        for name in ("lm_head.weight", f"{UP}.bias"):
            tensor = torch.randn(4, 4)
            assert quantize_tensor(name, tensor, named_scheme("blockwise")) == {name: tensor}

    def test_nan_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match=rf"{UP}\.weight: infinite or NaN weights .* weight\[1, 0\]"):
            quantize_tensor(f"{UP}.weight", torch.tensor([[1.0], [torch.nan]]), named_scheme("channelwise"))

    def test_two_tensors_of_one_name_are_refused(self) -> None:
        with pytest.raises(CheckpointError, match=rf"would have one name: \['{UP}.weight_scale'\]"):
            fp8_infos({f"{UP}.weight": WEIGHT, f"{UP}.weight_scale": WEIGHT}, named_scheme("channelwise"))


GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


class TestFusedExperts:
    @pytest.mark.parametrize("family", MOE_FAMILIES)
    @by_format
    def test_are_those_that_transformers_writes_one_by_one(self, family: str, format: str, tmp_path: Path) -> None:
        """transformers splits its fused parameters for Qwen3-Next: names and halves come from there."""
        fused, single = (
            write_moe(tmp_path / "fused", family, fused=True),
            write_moe(tmp_path / "s", family, fused=False),
        )
        assert GATE_UP in load_file(fused / "model.safetensors")
        reports = [quantize_checkpoint(d, tmp_path / n, format) for d, n in ((fused, "a"), (single, "b"))]
        assert set(reports[0].quantized) == set(reports[1].quantized)
        a, b = load_tensors(tmp_path / "a"), load_tensors(tmp_path / "b")
        assert a.keys() == b.keys()
        assert f"model.layers.0.mlp.experts.{MOE['num_experts'] - 1}.up_proj.{SUFFIX[format]}" in a
        assert all(torch.equal(bits(a[name]), bits(b[name])) for name in a)
        assert quantization_of(tmp_path / "a") == quantization_of(tmp_path / "b")

    def test_parts_cover_the_tensor(self) -> None:
        parts = expert_parts(GATE_UP, (2, 6, 5))
        assert [(p.name.removeprefix("model.layers.0.mlp."), p.expert, p.start, p.stop, p.shape) for p in parts] == [
            ("experts.0.gate_proj.weight", 0, 0, 3, (3, 5)),
            ("experts.0.up_proj.weight", 0, 3, 6, (3, 5)),
            ("experts.1.gate_proj.weight", 1, 0, 3, (3, 5)),
            ("experts.1.up_proj.weight", 1, 3, 6, (3, 5)),
        ]
        assert [p.name for p in expert_parts("experts.down_proj", (1, 5, 3))] == ["experts.0.down_proj.weight"]
        for name in ("model.layers.0.mlp.experts.0.down_proj.weight", "model.layers.0.mlp.gate_up_proj", "a"):
            assert expert_parts(name, (2, 6, 5)) == ()

    def test_stay_fused_where_none_is_quantized(self) -> None:
        infos = {GATE_UP: info_of(torch.empty(2, 6, 5)), DOWN: info_of(torch.empty(2, 5, 3))}
        scheme = named_scheme("channelwise", skip=("re:.*experts",))
        assert fp8_infos(infos, scheme) == infos
        tensor = torch.randn(2, 6, 5)
        assert quantize_tensor(GATE_UP, tensor, scheme) == {GATE_UP: tensor}

    def test_leave_as_they_are_one_by_one(self) -> None:
        """Those on the list keep their dtype, beside those that are not."""
        scheme = named_scheme("channelwise", skip=("re:.*experts.1",))
        tensor = torch.randn(2, 6, 5).bfloat16()
        got = quantize_tensor(GATE_UP, tensor, scheme)
        infos = {GATE_UP: info_of(tensor), DOWN: info_of(torch.empty(2, 5, 3))}
        expected = fp8_infos(infos, scheme)
        assert {name: info_of(t) for name, t in got.items()} == {n: i for n, i in expected.items() if "down" not in n}
        assert torch.equal(got["model.layers.0.mlp.experts.1.up_proj.weight"], tensor[1, 3:])
        assert got["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn

    @pytest.mark.parametrize("down", [(2, 3, 5), (2, 5, 6), (3, 5, 3), None])
    def test_of_another_layout_are_refused(self, down: tuple[int, ...] | None) -> None:
        infos = {GATE_UP: info_of(torch.empty(2, 6, 5))} | ({DOWN: info_of(torch.empty(down))} if down else {})
        with pytest.raises(
            CheckpointError, match=r"gate_up_proj and its down_proj have the shapes .*expected \[E, 2 I, H\]"
        ):
            fp8_infos(infos, named_scheme("blockwise"))


class TestSchemesRefuse:
    def test_an_unknown_name(self, tmp_path: Path) -> None:
        for call in (named_scheme, lambda name: Fp8Scheme(format=name, scale_format="fp32")):
            with pytest.raises(
                ValueError, match="unknown float8 scheme 'tensor'; known are blockwise, channelwise, mod"
            ):
                call("tensor")
        with pytest.raises(ValueError, match="unknown float8 scheme 'tensor'"):
            quantize_checkpoint(tmp_path, tmp_path / "out", "tensor")

    def test_fields_that_no_checkpoint_has(self) -> None:
        with pytest.raises(ValueError, match="scale_format='ue8m0' needs format='blockwise', got format='channelwise'"):
            Fp8Scheme(format="channelwise", scale_format="ue8m0")
        with pytest.raises(ValueError, match="a block must have"):
            Fp8Scheme(format="blockwise", scale_format="fp32", block=(0, 128))
        with pytest.raises(ValueError, match=r"'re:\(' .* is not a regular expression"):
            named_scheme("channelwise", skip=("re:(",))


def info_of(tensor: Tensor) -> TensorInfo:
    return TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape))
