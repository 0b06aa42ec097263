from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers.models import qwen3_5 as transformers_qwen3_5

from megatron_fp32.weights.families.qwen3_5 import Qwen35Config, mappings
from megatron_fp32.weights.naming import PREFIXES, Naming, find_prefix
from tests.qwen3_5 import SMALL

_FIELDS: dict[str, Any] = {**SMALL, "num_hidden_layers": 4}
del _FIELDS["layer_types"]


def _text_config(**fields: Any) -> dict[str, Any]:
    """A `config.json` as transformers writes it."""
    return transformers_qwen3_5.Qwen3_5TextConfig(**{**_FIELDS, **fields}).to_dict()


def _whole_config(*, tied: bool) -> dict[str, Any]:
    text = _text_config(tie_word_embeddings=tied)
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 27}
    return transformers_qwen3_5.Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=tied
    ).to_dict()


def test_a_text_config_gives_the_shapes() -> None:
    rope = {"rope_type": "default", "rope_theta": 12345.0, "partial_rotary_factor": 0.5}
    config = Qwen35Config.from_hf(_text_config(rms_norm_eps=3e-5, rope_parameters=rope))
    for name in _FIELDS.keys() - {"num_hidden_layers"}:
        assert getattr(config, name) == _FIELDS[name], name
    assert config.num_layers == 4
    assert (config.rope_theta, config.partial_rotary_factor, config.rms_norm_eps) == (12345.0, 0.5, 3e-5)
    assert (config.key_dim, config.value_dim) == (3 * 4, 9 * 22)


def test_layer_types_become_megatrons_pattern() -> None:
    config = Qwen35Config.from_hf(
        _text_config(layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"])
    )
    assert config.linear_attention_pattern == [0, 1, 1, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_config_inside_a_vision_language_config_is_found(tied: bool) -> None:
    whole = _whole_config(tied=tied)
    assert Qwen35Config.from_hf(whole) == Qwen35Config.from_hf(_text_config(tie_word_embeddings=tied))
    assert Qwen35Config.from_hf(whole).tie_word_embeddings is tied


def test_tying_may_stand_outside_of_the_text_config_only() -> None:
    whole = _whole_config(tied=True)
    del whole["text_config"]["tie_word_embeddings"]
    assert Qwen35Config.from_hf(whole).tie_word_embeddings is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen3_5_moe_text"}, "model_type.*'qwen3_5_moe_text'"),
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": None}, "model_type"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attn_output_gate": False}, "attn_output_gate=False"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta must be a number, got null"),
        ({"layer_types": ["full_attention"]}, "layer_types must name 4 layers"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "sliding_attention"),
    ],
)
def test_another_arithmetic_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen35Config.from_hf({**_text_config(), **fields})


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"hidden_act='gelu'.*attention_bias=True"):
        Qwen35Config.from_hf({**_text_config(), "hidden_act": "gelu", "attention_bias": True})


@pytest.mark.parametrize("name", [*sorted(_FIELDS.keys() - {"num_hidden_layers"}), "rms_norm_eps"])
def test_a_missing_field_is_named(name: str) -> None:
    config = _text_config()
    del config[name]
    with pytest.raises(ValueError, match=f"lacks {name}"):
        Qwen35Config.from_hf(config)


@pytest.mark.parametrize("name", ["num_hidden_layers", "layer_types"])
def test_a_missing_layer_pattern_is_named(name: str) -> None:
    config = _text_config()
    config.pop(name, None)
    with pytest.raises(ValueError, match=name):
        Qwen35Config.from_hf(config)


@pytest.mark.parametrize("outer", [False, True])
def test_the_outer_config_decides_on_tying(outer: bool) -> None:
    whole = _whole_config(tied=outer)
    whole["text_config"]["tie_word_embeddings"] = not outer
    with torch.device("meta"):
        model = transformers_qwen3_5.Qwen3_5ForConditionalGeneration(transformers_qwen3_5.Qwen3_5Config(**whole))
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert tied is outer
    assert Qwen35Config.from_hf(whole).tie_word_embeddings is tied


def test_the_prefix_is_taken_from_the_embedding() -> None:
    assert find_prefix({"model.embed_tokens.weight": 0, "lm_head.weight": 0}) == "model."
    assert find_prefix({"model.language_model.embed_tokens.weight": 0}) == "model.language_model."
    with pytest.raises(ValueError, match=r"model\.language_model\.embed_tokens\.weight nor model\.embed_tokens"):
        find_prefix({"transformer.wte.weight": 0})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_tensor_of_transformers_model_is_mapped_once(prefix: str, tied: bool) -> None:
    with torch.device("meta"):
        if prefix == "model.":
            model: Any = transformers_qwen3_5.Qwen3_5ForCausalLM(
                transformers_qwen3_5.Qwen3_5TextConfig(**_text_config(tie_word_embeddings=tied))
            )
        else:
            model = transformers_qwen3_5.Qwen3_5ForConditionalGeneration(
                transformers_qwen3_5.Qwen3_5Config(**_whole_config(tied=tied))
            )
    theirs = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("model.visual.")}
    config = Qwen35Config.from_hf(_text_config(tie_word_embeddings=tied))
    ours = [spec for mapping in mappings(config, Naming(prefix=prefix)) for spec in mapping.hf]
    assert max(Counter(spec.name for spec in ours).values()) == 1
    assert {spec.name: spec.shape for spec in ours} == theirs
