"""Families are found, their configurations read, and what is not implemented refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_fp32.models import provider
from megatron_fp32.weights.families.registry import FAMILIES, find_family
from megatron_fp32.weights.hf_config.rotary import Llama3RopeScaling
from megatron_fp32.weights.naming import Naming
from megatron_fp32.weights.stacking import extra_states, has_stacked_layers, stack_layers
from tests.families import CASES, Case, case


def _config(name: str, **fields: Any) -> dict[str, Any]:
    """A `config.json` as transformers writes it, with changes."""
    config: dict[str, Any] = json.loads(case(name).text_config().to_json_string(use_diff=True))
    return {**config, **fields}


@pytest.mark.parametrize("case", [c for c in CASES if not c.outer], ids=lambda case: case.name)
def test_a_config_gives_the_shapes(case: Case) -> None:
    hf = case.text_config()
    family = find_family(hf.to_dict())
    config = family.parse(_config(case.name))
    assert hf.model_type in family.model_types
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"):
        assert getattr(config, name) == getattr(hf, name), name
    assert config.num_layers == hf.num_hidden_layers
    assert config.tie_word_embeddings == hf.tie_word_embeddings
    assert config.rope_theta == hf.rope_parameters["rope_theta"]
    assert config.partial_rotary_factor == hf.rope_parameters.get("partial_rotary_factor", 1.0)
    assert config.num_experts == getattr(hf, "num_experts", 0)
    assert config.norm_topk_prob == getattr(hf, "norm_topk_prob", True)
    assert config.linear_attention_pattern == [
        int(kind == "linear_attention") for kind in getattr(hf, "layer_types", None) or ["full_attention"] * 3
    ]


def test_every_family_has_its_own_model_types() -> None:
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"'gpt2', which is not supported.*Llama \(llama\).*list it in registry\.py",
        ),
        ({}, "names no model_type"),
        ([], "must hold an object, got list"),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "other"}}, "'other', which is not supported"),
        ({"text_config": 3}, "names no model_type"),
    ],
)
def test_an_unknown_model_type_is_refused_with_those_that_are_known(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_family(config)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Llama", {"mlp_bias": True}, r"Llama config is not supported: mlp_bias=True \(expected False\)"),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type='yarn'"),
        ("Qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("Qwen3", {"per_layer_config": {"1": {"head_dim": 6}}}, r"per_layer_config=\{'1'.*\(expected None\)"),
        ("Qwen3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_type='llama3'"),
        ("Qwen3-MoE", {"attention_bias": True}, "attention_bias=True"),
        ("Qwen3-Next", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("Qwen3-VL-MoE", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("Qwen3.5-MoE", {"attn_output_gate": False}, "attn_output_gate=False"),
        ("Qwen3.5-MoE", {"layer_types": ["linear_attention"]}, "layer_types must name 3 layers"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types must name"),
    ],
)
def test_other_arithmetic_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    config = _config(name, **fields)
    with pytest.raises(ValueError, match=message):
        find_family(config).parse(config)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Llama", {"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ("Llama", {"num_attention_heads": 5}, "hidden_size=36 is not a multiple of num_attention_heads=5"),
        ("Llama", {"head_dim": 7}, "head_dim=7 is odd"),
        ("Llama", {"head_dim": 0}, "head_dim must be an integer from 1"),
        ("Llama", {"head_dim": -4}, "head_dim must be an integer from 1"),
        ("Llama", {"intermediate_size": 0}, "intermediate_size must be at least 1, got 0"),
        ("Qwen3", {"num_key_value_heads": 5}, "num_attention_heads=6 is not a multiple of num_key_value_heads=5"),
        ("Qwen3", {"num_key_value_heads": 12}, "num_attention_heads=6 is not a multiple of num_key_value_heads=12"),
        ("Qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types must name 3 layers, each 'full_attention'"),
        ("Qwen3-MoE", {"num_experts_per_tok": 6}, "num_experts_per_tok=6 is more than num_experts=5"),
        ("Qwen3-MoE", {"num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1, got 0"),
        ("Qwen3-MoE", {"moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1, got 0"),
        ("Qwen3-MoE, a dense layer", {"intermediate_size": 0}, "intermediate_size must be at least 1, got 0"),
        ("Qwen3-Next", {"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ("Qwen3-Next", {"linear_num_key_heads": 4}, "linear_num_value_heads=6 is not a multiple of linear_num_key"),
        ("Qwen3-Next", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be at least 1"),
        (
            "Qwen3.5",
            {"linear_num_value_heads": 3},
            "=3 is not a multiple of linear_num_key_heads=2",
        ),
        (
            "Qwen3.5",
            {"linear_num_value_heads": 1},
            "=1 is not a multiple of linear_num_key_heads=2",
        ),
        ("Qwen3.5", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim must be an integer from 1"),
        ("Qwen3.5-MoE", {"num_experts": 0}, "num_experts must be at least 1, got 0"),
    ],
)
def test_sizes_that_no_model_has_are_refused(name: str, fields: dict[str, Any], message: str) -> None:
    config = _config(name, **fields)
    if "num_experts" in fields:
        config.pop("num_local_experts", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        find_family(config).parse(config)


@pytest.mark.parametrize(("kv_heads", "expected"), [(1, 1), (3, 3), (6, 6), (None, 6)])
def test_heads_that_divide_are_taken(kv_heads: int | None, expected: int) -> None:
    config = _config("Qwen3", num_key_value_heads=kv_heads)
    assert find_family(config).parse(config).num_key_value_heads == expected


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Qwen3", "num_key_value_heads"),
        ("Qwen3-MoE", "num_key_value_heads"),
        ("Llama", "intermediate_size"),
        ("Qwen3", "head_dim"),
        ("Qwen3-MoE", "moe_intermediate_size"),
        ("Qwen3-MoE", "num_local_experts"),
        ("Qwen3-Next", "shared_expert_intermediate_size"),
        ("Qwen3-Next", "norm_topk_prob"),
        ("Qwen3.5-MoE", "num_experts_per_tok"),
        ("Qwen3.5-MoE", "layer_types"),
    ],
)
def test_a_missing_field_is_named(name: str, field: str) -> None:
    config = _config(name)
    del config[field]
    with pytest.raises(ValueError, match=f"lacks {field.replace('local_', '')}"):
        find_family(config).parse(config)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Llama", {"hidden_size": "36"}, "hidden_size must be an integer from 1 to 2147483647, got '36'"),
        ("Llama", {"num_attention_heads": 0}, "num_attention_heads must be an integer from 1"),
        ("Llama", {"vocab_size": True}, "vocab_size must be an integer from 1"),
        ("Llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 4096"),
        ("Llama", {"num_hidden_layers": None}, "config.json lacks num_hidden_layers"),
        ("Llama", {"rms_norm_eps": [1e-5]}, "rms_norm_eps must be a finite number"),
        ("Llama", {"rope_parameters": "default"}, "rope_parameters must hold an object, got 'default'"),
        ("Llama", {"rope_parameters": {"rope_theta": "1"}}, "rope_theta must be a finite number above 0, got '1'"),
        ("Qwen3-MoE", {"num_local_experts": 10**6}, "num_local_experts must be an integer from 0 to 65536"),
        ("Qwen3-MoE", {"mlp_only_layers": 1}, "mlp_only_layers must be a list of integers, got '1'"),
        ("Qwen3-MoE", {"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer from 1"),
        ("Qwen3.5", {"layer_types": [1, 2, 3]}, "layer_types must be a list of text"),
        ("Qwen3.5", {"linear_key_head_dim": None}, "config.json lacks linear_key_head_dim"),
    ],
)
def test_a_field_of_another_kind_is_named(name: str, fields: dict[str, Any], message: str) -> None:
    config = _config(name, **fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        find_family(config).parse(config)


class TestOlderConfigs:
    """Files from before transformers 5, as the released checkpoints have them."""

    def test_rotary_fields_at_the_top_level(self) -> None:
        config = _config("Llama")
        new = find_family(config).parse(config)
        rope = config.pop("rope_parameters")
        old = {**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        assert find_family(old).parse(old) == new
        assert new.rope_scaling == Llama3RopeScaling(
            factor=4.0, low_freq_factor=1.5, high_freq_factor=3.0, original_max_position_embeddings=48
        )

    def test_a_null_for_no_scaling(self) -> None:
        config = _config("Qwen3", rope_parameters=None, rope_theta=1e6, rope_scaling=None)
        assert find_family(config).parse(config).rope_theta == 1e6

    def test_a_partial_rotary_factor_beside_the_other_rotary_fields(self) -> None:
        config = _config("Qwen3-Next", rope_parameters=None, rope_theta=1e6, partial_rotary_factor=0.125)
        assert find_family(config).parse(config).partial_rotary_factor == 0.125
        del config["partial_rotary_factor"]
        assert find_family(config).parse(config).partial_rotary_factor == 0.25

    def test_an_interval_instead_of_layer_types(self) -> None:
        config = _config("Qwen3-Next", layer_types=None, full_attention_interval=2, num_hidden_layers=5)
        assert find_family(config).parse(config).linear_attention_pattern == [1, 0, 1, 0, 1]

    @pytest.mark.parametrize(
        ("layers", "freq"),
        [("LLFLLF", 3), ("LFLFL", 2), ("LLF", 3), ("LLFL", 3), ("LLL", 4), ("FFF", [0, 0, 0]), ("FLLF", [0, 1, 1, 0])],
    )
    def test_attention_in_every_nth_layer_is_said_as_a_number(self, layers: str, freq: int | list[int]) -> None:
        names = {"L": "linear_attention", "F": "full_attention"}
        config = _config("Qwen3.5", layer_types=[names[layer] for layer in layers], num_hidden_layers=len(layers))
        assert find_family(config).parse(config).linear_attention_freq == freq

    def test_a_step_between_experts_that_is_null(self) -> None:
        config = _config("Qwen3-MoE", decoder_sparse_step=None)
        assert find_family(config).parse(config).dense_layers == ()

    def test_a_number_of_experts_under_its_old_name(self) -> None:
        config = _config("Qwen3-MoE")
        renamed = {"num_experts" if name == "num_local_experts" else name: v for name, v in config.items()}
        assert renamed != config
        assert find_family(renamed).parse(renamed) == find_family(config).parse(config)

    @pytest.mark.parametrize("absent", ["factor", "low_freq_factor", "original_max_position_embeddings"])
    def test_incomplete_scaling_is_refused(self, absent: str) -> None:
        config = _config("Llama")
        del config["rope_parameters"][absent]
        config.pop("max_position_embeddings", None)  # what transformers takes for a length that is absent
        with pytest.raises(ValueError, match=rf"lacks rope_parameters\.{absent}"):
            find_family(config).parse(config)


@pytest.mark.parametrize(
    ("fields", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [0, 2]}, (0, 2)),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (0, 1, 2)),
    ],
)
def test_dense_layers_are_those_that_transformers_builds_dense(fields: dict[str, Any], dense: tuple[int, ...]) -> None:
    from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    hf = Qwen3MoeConfig(**{**case("Qwen3-MoE").fields, **fields})
    with torch.device("meta"):
        layers = Qwen3MoeForCausalLM(hf).model.layers
    built = tuple(i for i, layer in enumerate(layers) if hasattr(layer.mlp, "gate_proj"))
    config = find_family(hf.to_dict()).parse(hf.to_dict())
    assert config.dense_layers == built == dense
    assert config.is_homogeneous is not bool(dense)


class TestNaming:
    def test_it_is_read_from_the_names(self) -> None:
        names = ["model.language_model.embed_tokens.weight", "mtp.fc.weight", "mtp.layers.0.mlp.experts.gate_up_proj"]
        assert Naming.from_tensors(names) == Naming(
            prefix="model.language_model.", mtp_layers=1, fused_experts=False, fused_mtp_experts=True
        )
        names = ["model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_up_proj", "mtp.layers.2.x"]
        assert Naming.from_tensors(names) == Naming(prefix="model.", mtp_layers=3, fused_experts=True)

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize(("hidden", "ffn"), [(36, 14), (28, 14), (14, 14), (14, 28), (1, 1)])
    def test_the_layout_of_fused_experts_is_read_from_their_shapes(
        self, hidden: int, ffn: int, transposed: bool
    ) -> None:
        shapes = {"gate_up_proj": (5, 2 * ffn, hidden), "down_proj": (5, hidden, ffn)}
        if transposed:
            shapes = {name: (a, c, b) for name, (a, b, c) in shapes.items()}
        named = {f"model.layers.0.mlp.experts.{name}": shape for name, shape in shapes.items()}
        names = ["model.embed_tokens.weight", *named]
        assert Naming.from_tensors(names, named).transposed_experts is transposed

    def test_several_mtp_layers_are_refused(self) -> None:
        config = find_family(_config("Qwen3.5")).parse(_config("Qwen3.5"))
        with pytest.raises(ValueError, match="2 MTP layers; only one can be converted"):
            list(find_family(_config("Qwen3.5")).mappings(config, Naming(prefix="model.", mtp_layers=2)))


class TestLayout:
    def test_layers_that_are_alike_are_stacked_outside_of_experts(self) -> None:
        family = find_family(_config("Qwen3-MoE"))
        config = family.parse(_config("Qwen3-MoE"))
        one_by_one = list(family.mappings(config, Naming(prefix="model.")))
        stacked = list(stack_layers(one_by_one, 3))
        shapes = {spec.name: spec.stored_shape for mapping in stacked for spec in mapping.megatron}
        assert shapes["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (3, 5, 28, 36)
        assert shapes["decoder.layers.mlp.router.weight"] == (3, 5, 36)
        assert shapes["decoder.final_layernorm.weight"] == (36,)
        assert has_stacked_layers(shapes)
        assert not has_stacked_layers(spec.name for mapping in one_by_one for spec in mapping.megatron)
        assert [m.hf for m in stacked] == [m.hf for m in one_by_one]
        assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_2.4_3.5" in extra_states(stacked)


class TestRotaryScaling:
    def test_frequencies_of_the_built_model_are_those_of_transformers(self, megatron: None) -> None:
        hf = case("Llama").text_config()
        config = find_family(hf.to_dict()).parse(hf.to_dict())
        model = provider.build_model(config, provider.transformer_config(config, **provider.cpu_overrides()))
        theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
        assert factor == 1.0
        plain = 1 / 1e4 ** (torch.arange(0, 12, 2) / 12)
        assert (theirs / plain).unique().numel() > 2  # some are kept, some divided, some in between
        assert torch.allclose(model.rotary_pos_emb.inv_freq, theirs, rtol=1e-6, atol=0)

    def test_numbers_without_a_flag_are_refused(self) -> None:
        config = find_family(_config("Llama")).parse(_config("Llama"))
        with pytest.raises(ValueError, match=r"Megatron has no flags for.*original_max_position_embeddings=48"):
            config.megatron_arguments()


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_a_router_that_megatron_core_refuses_is_built_unless_it_is_overridden(pre_softmax: bool) -> None:
    config = _config("Qwen3-MoE", num_experts_per_tok=1)
    overrides = {"moe_router_pre_softmax": True} if pre_softmax else {}
    built = provider.transformer_config(find_family(config).parse(config), **overrides)
    assert (built.moe_router_topk, built.moe_router_pre_softmax) == (1, pre_softmax)


def test_a_router_that_megatrons_parser_refuses_has_no_flags() -> None:
    config = _config("Qwen3-MoE", num_experts_per_tok=1)
    with pytest.raises(ValueError, match="num_experts_per_tok=1 with norm_topk_prob"):
        find_family(config).parse(config).megatron_arguments()
    config = _config("Qwen3-MoE", num_experts_per_tok=1, norm_topk_prob=False)
    assert "--moe-router-pre-softmax" in find_family(config).parse(config).megatron_arguments()


def test_a_config_is_found_from_its_directory(tmp_path: Path) -> None:
    case("Qwen3").text_config().save_pretrained(tmp_path)
    assert provider.read_hf_config(tmp_path).qk_norm
