"""Names, lists of modules, detection and whole checkpoints in float8."""

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

from megatron_fp32.checkpoint.fp8 import (
    Fp8Scheme,
    detect_scheme,
    expert_parts,
    fp8_infos,
    is_quantized,
    named_scheme,
    quantization_config,
    quantize_tensor,
    scheme_from_config,
    scheme_of_tensors,
)
from megatron_fp32.checkpoint.huggingface import CheckpointError, TensorInfo
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.ops.fp8.reference import quantize_reference
from tests.checkpoint.fp8_models import MOE, MOE_FAMILIES, config_of, write_dense, write_moe, written
from tests.checkpoint.support import assets, bits, rewrite, tree

LAYOUTS = ("blockwise", "channelwise", "modelopt")
SUFFIX = {"blockwise": "weight_scale_inv", "channelwise": "weight_scale", "modelopt": "weight_scale"}
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
WEIGHT = TensorInfo(dtype=torch.bfloat16, shape=(256, 384))


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

    def of(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("quantized") / layout
            quantize_checkpoint(dense, made[layout], layout)
        return made[layout]

    return of


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
            "mtp.fc",
            "mtp.pre_fc_norm_hidden",
            "mtp.shared_head.head",
        ],
    )
    @by_layout
    def test_what_is_never_quantized(self, module: str, layout: str) -> None:
        """Whatever the scheme says, a 2-D weight though it be."""
        exactly = Fp8Scheme(layout=layout, scale_format="fp32", modules=frozenset({module}))  # type: ignore[arg-type]
        assert not is_quantized(f"{module}.weight", WEIGHT, named_scheme(layout))
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
            "mtp.layers.0.self_attn.k_proj",
        ],
    )
    @by_layout
    def test_what_is_quantized(self, module: str, layout: str) -> None:
        scheme = named_scheme(layout)
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
        ("layout", "entry", "skipped", "kept"),
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
        self, layout: str, entry: str, skipped: list[str], kept: list[str]
    ) -> None:
        scheme = named_scheme(layout, skip=("other", entry))
        assert [scheme.skips(module) for module in skipped] == [True] * len(skipped)
        assert [scheme.skips(module) for module in kept] == [False] * len(kept)
        assert not is_quantized(f"{skipped[0]}.weight", WEIGHT, scheme)
        assert is_quantized(f"{kept[0]}.weight", WEIGHT, scheme)

    def test_modules_of_a_checkpoint_decide_alone(self) -> None:
        scheme = Fp8Scheme(layout="blockwise", scale_format="fp32", skip=("a",), modules=frozenset({"a"}))
        assert is_quantized("a.weight", WEIGHT, scheme)
        assert not is_quantized("b.weight", WEIGHT, scheme)


class TestNamesAndShapes:
    @pytest.mark.parametrize(
        ("layout", "scale", "shape", "dtype"),
        [
            ("blockwise", "a.weight_scale_inv", (2, 3), torch.float32),
            ("channelwise", "a.weight_scale", (200, 1), torch.bfloat16),
            ("modelopt", "a.weight_scale", (200,), torch.float32),
        ],
    )
    def test_of_each_layout(self, layout: str, scale: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        weight = torch.randn(200, 300).bfloat16()
        infos = fp8_infos({"a.weight": info_of(weight), "a.bias": info_of(weight[0])}, named_scheme(layout))
        assert infos == {
            "a.weight": TensorInfo(dtype=torch.float8_e4m3fn, shape=(200, 300)),
            scale: TensorInfo(dtype=dtype, shape=shape),
            "a.bias": TensorInfo(dtype=torch.bfloat16, shape=(300,)),
        }
        got = quantize_tensor("a.weight", weight, named_scheme(layout))
        assert {name: info_of(t) for name, t in got.items()} == {n: infos[n] for n in ("a.weight", scale)}
        block = (128, 128) if layout == "blockwise" else (1, 300)
        codes, scales = quantize_reference(weight, block, scale_format="bf16" if layout == "channelwise" else "fp32")
        assert torch.equal(bits(got["a.weight"]), bits(codes))
        assert torch.equal(got[scale].double().flatten(), scales.flatten())

    @pytest.mark.parametrize("scale_format", ["bf16", "ue8m0"])
    def test_of_other_scales_and_blocks(self, scale_format: Any) -> None:
        scheme = Fp8Scheme(layout="blockwise", scale_format=scale_format, block=(32, 64))
        weight = torch.randn(70, 130)
        got = quantize_tensor("a.weight", weight, scheme)
        assert {n: info_of(t) for n, t in got.items()} == fp8_infos({"a.weight": info_of(weight)}, scheme)
        codes, scales = quantize_reference(weight, (32, 64), scale_format=scale_format)
        assert torch.equal(bits(got["a.weight"]), bits(codes))
        assert torch.equal(got["a.weight_scale_inv"].double(), scales)

    def test_what_is_not_quantized_is_the_same_tensor(self) -> None:
        for name in ("lm_head.weight", "a.bias"):
            tensor = torch.randn(4, 4)
            assert quantize_tensor(name, tensor, named_scheme("blockwise")) == {name: tensor}

    def test_nan_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match=r"a\.weight: infinite or NaN weights cannot be quantized: weight\[1, 0\]"):
            quantize_tensor("a.weight", torch.tensor([[1.0], [torch.nan]]), named_scheme("channelwise"))

    def test_two_tensors_of_one_name_are_refused(self) -> None:
        with pytest.raises(CheckpointError, match=r"\['a.weight_scale'\] would be there twice"):
            fp8_infos({"a.weight": WEIGHT, "a.weight_scale": WEIGHT}, named_scheme("channelwise"))


GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


class TestFusedExperts:
    @pytest.mark.parametrize("family", MOE_FAMILIES)
    @by_layout
    def test_are_those_that_transformers_writes_one_by_one(self, family: str, layout: str, tmp_path: Path) -> None:
        """transformers splits its fused parameters for Qwen3-Next: names and halves come from there."""
        fused, single = (
            write_moe(tmp_path / "fused", family, fused=True),
            write_moe(tmp_path / "s", family, fused=False),
        )
        assert GATE_UP in load_file(fused / "model.safetensors")
        reports = [quantize_checkpoint(d, tmp_path / n, layout) for d, n in ((fused, "a"), (single, "b"))]
        assert set(reports[0].quantized) == set(reports[1].quantized)
        a, b = written(tmp_path / "a"), written(tmp_path / "b")
        assert a.keys() == b.keys()
        assert f"model.layers.0.mlp.experts.{MOE['num_experts'] - 1}.up_proj.{SUFFIX[layout]}" in a
        assert all(torch.equal(bits(a[name]), bits(b[name])) for name in a)
        assert config_of(tmp_path / "a") == config_of(tmp_path / "b")

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
        with pytest.raises(CheckpointError, match=r"gate_up_proj and its down_proj are .*expected \[E, 2 I, H\]"):
            fp8_infos(infos, named_scheme("blockwise"))


class TestDetection:
    @by_layout
    def test_a_scheme_is_found_in_headers_and_in_configs(
        self, layout: str, dense: Path, quantized: Callable[[str], Path], tmp_path: Path
    ) -> None:
        """Both make the same checkpoint again."""
        made = quantized(layout)
        found = detect_scheme(made)
        assert (found.layout, found.scale_format) == (layout, named_scheme(layout).scale_format)
        weights = written(made)
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
        assert module not in config_of(made)["modules_to_not_convert"]
        modules = detect_scheme(made).modules
        assert modules is not None
        assert module not in modules
        assert "model.layers.1.mlp.up_proj" in modules

    @pytest.mark.parametrize(
        ("scale", "dtype", "layout", "scale_format"),
        [
            ("a.weight_scale_inv", torch.bfloat16, "blockwise", "bf16"),
            ("a.weight_scale", torch.float32, "channelwise", "fp32"),
        ],
    )
    def test_the_dtype_of_scales_is_that_of_the_headers(
        self, scale: str, dtype: torch.dtype, layout: str, scale_format: str
    ) -> None:
        shape = (2, 3) if scale.endswith("_inv") else (256, 1)
        found = scheme_of_tensors({"a.weight": F8, scale: TensorInfo(dtype=dtype, shape=shape)})
        assert (found.layout, found.scale_format, found.block) == (layout, scale_format, (128, 128))

    def test_blocks_and_powers_of_two_are_those_of_the_config(self) -> None:
        tensors = {"a.weight": F8, "a.weight_scale_inv": TensorInfo(dtype=torch.float32, shape=(4, 12))}
        config = {**BLOCKWISE, "weight_block_size": [64, 32], "scale_fmt": "ue8m0"}
        found = scheme_of_tensors(tensors, config)
        assert (found.block, found.scale_format) == ((64, 32), "ue8m0")
        again = quantization_config(fp8_infos({"a.weight": WEIGHT}, found), found)
        assert again == {**config, "modules_to_not_convert": []}

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({}, "no weight is float8"),
            ({"a.weight_scale": (1,)}, r"unknown float8 scheme: a\.weight is \(256, 384\) and .* is \(1,\)"),
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
        with pytest.raises(CheckpointError, match=r"unknown float8 scheme: b\.weight .*other weights"):
            scheme_of_tensors({**two, "a.weight_scale": scale(256, 1), "b.weight_scale": scale(256)})
        with pytest.raises(CheckpointError, match="all float32 or all bfloat16"):
            scheme_of_tensors({**two, "a.weight_scale": scale(256), "b.weight_scale": scale(256, dtype=torch.bfloat16)})
        fused = TensorInfo(dtype=torch.float8_e4m3fn, shape=(2, 6, 5))
        with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj"):
            scheme_of_tensors({"experts.gate_up_proj": fused, "experts.gate_up_proj_scale_inv": scale(2, 1, 1)})

    def test_a_config_that_contradicts_the_headers_is_an_error(self) -> None:
        tensors = {"a.weight": F8, "a.weight_scale": TensorInfo(dtype=torch.float32, shape=(256, 1))}
        with pytest.raises(CheckpointError, match="headers are those of a channelwise checkpoint, the config is block"):
            scheme_of_tensors(tensors, BLOCKWISE)
        with pytest.raises(CheckpointError, match="unknown quantization method 'fbgemm_fp8'"):
            scheme_of_tensors(tensors, {"quant_method": "fbgemm_fp8"})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"quant_method": "gptq"}, "unknown quantization method 'gptq'"),
            ({"weight_block_size": None}, "scales are per tensor"),
            ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
            ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ],
    )
    def test_a_blockwise_config_that_it_does_not_know(self, change: dict[str, Any], message: str) -> None:
        assert scheme_from_config(BLOCKWISE).layout == "blockwise"
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
        assert scheme_from_config(config).layout == "channelwise"
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
        with pytest.raises(CheckpointError, match="neither weights nor a config"):
            detect_scheme(tmp_path)
        (tmp_path / "config.json").write_text("[")
        with pytest.raises(CheckpointError, match=r"config\.json is no JSON"):
            detect_scheme(tmp_path)


PER_CHANNEL = "FP8_PER_CHANNEL_PER_TOKEN"
F8 = TensorInfo(dtype=torch.float8_e4m3fn, shape=(256, 384))
BLOCKWISE = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


class TestWholeCheckpoints:
    @by_layout
    def test_every_value_is_the_definitions_and_all_else_is_unchanged(
        self, layout: str, dense: Path, quantized: Callable[[str], Path]
    ) -> None:
        source, made = load_file(dense / "model.safetensors"), written(quantized(layout))
        float8 = {name for name, t in made.items() if t.dtype == torch.float8_e4m3fn}
        scales = {name for name in made if name.endswith(SUFFIX[layout])}
        assert made.keys() - scales == source.keys()
        assert {name.replace(SUFFIX[layout], "weight") for name in scales} == float8
        assert len(float8) == 3 + 4 + 2 * 3  # in_proj_qkv, in_proj_z, out_proj; q, k, v, o; three of each MLP
        for name, tensor in source.items():
            if name not in float8:
                assert torch.equal(bits(made[name]), bits(tensor)), name
                assert made[name].dtype == tensor.dtype
                continue
            scale = made[name.replace("weight", SUFFIX[layout])]
            block = (128, 128) if layout == "blockwise" else (1, tensor.shape[1])
            codes, expected = quantize_reference(
                tensor, block, scale_format="bf16" if layout == "channelwise" else "fp32"
            )
            assert torch.equal(bits(made[name]), bits(codes))
            assert torch.equal(scale.double().flatten(), expected.flatten())

    @by_layout
    def test_the_config_says_how_and_other_files_are_copied(
        self, layout: str, dense: Path, quantized: Callable[[str], Path]
    ) -> None:
        made = quantized(layout)
        config = json.loads((made / "config.json").read_text())
        quantization = config.pop("quantization_config")
        assert config == json.loads((dense / "config.json").read_text())
        names = {"blockwise": "modules_to_not_convert", "channelwise": "ignore", "modelopt": "ignore"}
        linear = "model.layers.0.linear_attn."
        listed = ["lm_head", "model.embed_tokens", *(f"{linear}{m}" for m in ("conv1d", "in_proj_a", "in_proj_b"))]
        assert quantization[names[layout]] == listed
        files = tree(made)
        expected = {k: v for k, v in tree(dense).items() if k not in ("config.json", "model.safetensors")}
        assert {name: files[name] for name in expected} == expected
        assert ("hf_quant_config.json" in files) == (layout == "modelopt")

    def test_shards_hold_the_same(self, dense: Path, quantized: Callable[[str], Path], tmp_path: Path) -> None:
        quantize_checkpoint(dense, tmp_path / "out", "blockwise", max_shard_bytes=200_000)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
        a, b = written(tmp_path / "out"), written(quantized("blockwise"))
        assert a.keys() == b.keys()
        assert all(torch.equal(bits(a[name]), bits(b[name])) for name in a)
        assert detect_scheme(tmp_path / "out") == detect_scheme(quantized("blockwise"))

    def test_the_report_and_the_progress_count_what_is_written(self, dense: Path, tmp_path: Path) -> None:
        calls: list[tuple[str, int, int]] = []
        report = quantize_checkpoint(dense, tmp_path / "out", "modelopt", progress=lambda *a: calls.append(a))
        made = written(tmp_path / "out")
        total = sum(t.nbytes for t in made.values())
        assert report.nbytes == total
        assert {call[2] for call in calls} == {total}
        assert sum(n for action, n, _ in calls if action == "write") == total
        assert sum(n for action, n, _ in calls if action == "verify") == total
        assert set(report.quantized) == {n for n, t in made.items() if t.dtype.itemsize == 1}
        assert set(report.kept) == {n for n in made if n not in report.quantized and not n.endswith("weight_scale")}
        assert report.directory == tmp_path / "out"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t: {**t, "model.layers.0.mlp.up_proj.weight": torch.full((384, 256), torch.inf)},
                "up_proj.weight: inf",
            ),
            (lambda t: {"lm_head.weight": t["lm_head.weight"]}, "no weight that the blockwise scheme quantizes"),
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
        with pytest.raises(CheckpointError, match=r"config\.json is missing"):
            quantize_checkpoint(tmp_path / "empty", tmp_path / "new", "blockwise")

    def test_a_disk_that_forgets_is_noticed(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from megatron_fp32.checkpoint.safetensors_writer import SafetensorsFile

        finish = SafetensorsFile.finish

        def damage(file: SafetensorsFile, **options: Any) -> None:
            finish(file, **options)
            with file._path.open("r+b") as stream:
                stream.seek(file._starts["model.layers.1.mlp.up_proj.weight"] + 5)
                stream.write(b"\x01")

        monkeypatch.setattr(SafetensorsFile, "finish", damage)
        with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' reads back other values"):
            quantize_checkpoint(dense, tmp_path / "out", "blockwise")
        assert not (tmp_path / "out").exists()


class TestSchemesRefuse:
    def test_an_unknown_name(self, tmp_path: Path) -> None:
        for call in (named_scheme, lambda name: Fp8Scheme(layout=name, scale_format="fp32")):
            with pytest.raises(
                ValueError, match="unknown float8 scheme 'tensor'; known are blockwise, channelwise, mod"
            ):
                call("tensor")
        with pytest.raises(ValueError, match="unknown float8 scheme 'tensor'"):
            quantize_checkpoint(tmp_path, tmp_path / "out", "tensor")

    def test_fields_that_no_checkpoint_has(self) -> None:
        with pytest.raises(ValueError, match="powers of two are scales of blockwise"):
            Fp8Scheme(layout="channelwise", scale_format="ue8m0")
        with pytest.raises(ValueError, match="a block must have"):
            Fp8Scheme(layout="blockwise", scale_format="fp32", block=(0, 128))
        with pytest.raises(ValueError, match=r"'re:\(' .* is no regular expression"):
            named_scheme("channelwise", skip=("re:(",))


def info_of(tensor: Tensor) -> TensorInfo:
    return TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape))


def test_a_safetensors_file_of_zeros_has_the_producers_scales(tmp_path: Path) -> None:
    """compressed-tensors: the smallest step of the scale's dtype; the others: 1."""
    expected = {"blockwise": 1.0, "channelwise": 2.0**-7, "modelopt": 1.0}
    for layout, scale in expected.items():
        got = quantize_tensor("a.weight", torch.zeros(4, 8), named_scheme(layout))
        save_file(got, tmp_path / f"{layout}.safetensors")
        stored = load_file(tmp_path / f"{layout}.safetensors")
        assert (stored[f"a.{SUFFIX[layout]}"].float() == scale).all()
        assert not bits(stored["a.weight"]).any()
