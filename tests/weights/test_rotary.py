"""Rotary fields of `config.json`, wherever they stand, give the frequencies of the model that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_fp32.weights.families.registry import find_family
from megatron_fp32.weights.hf_config.decoder import DecoderConfig
from megatron_fp32.weights.hf_config.rotary import inverse_frequencies
from tests.families import CASES, case, config_json

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 48,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 2e4}
ABSENT = object()


def _config(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    config = {**json.loads(case(name).text_config().to_json_string(use_diff=True)), **fields}
    return {key: value for key, value in config.items() if value is not ABSENT}


def _theirs(directory: Path, config: dict[str, Any]) -> tuple[Any, Tensor]:
    """transformers' configuration, and the frequencies of the model that it builds."""
    (directory / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(directory)
    return theirs, AutoModelForCausalLM.from_config(theirs).model.rotary_emb.inv_freq


def _frequencies(config: DecoderConfig) -> Tensor:
    return inverse_frequencies(config.head_dim, config.rope_theta, config.partial_rotary_factor, config.rope_scaling)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Llama", {"rope_parameters": DEFAULT, "rope_scaling": LLAMA3}),
        ("Llama", {"rope_parameters": DEFAULT, "rope_scaling": LLAMA3, "rope_theta": 3e4}),
        ("Llama", {"rope_parameters": {**LLAMA3, **DEFAULT}, "rope_scaling": {}}),
        ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 2e4}, "rope_scaling": {"rope_type": "default"}}),
        ("Llama", {"rope_parameters": ABSENT, "rope_scaling": {**LLAMA3, "rope_theta": 7e4}, "rope_theta": 3e4}),
        ("Llama", {"rope_parameters": ABSENT, "rope_scaling": {**LLAMA3, "type": "default"}, "rope_theta": 3e4}),
        ("Llama", {"rope_parameters": {"type": "default", "rope_theta": 2e4}}),
        ("Llama", {"rope_parameters": ABSENT, "rope_scaling": None, "rope_theta": 3e4}),
        ("Llama", {"rope_parameters": ABSENT}),
        ("Llama", {"rope_parameters": None, "rope_theta": 26914.64}),
        ("Llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}),
        ("Llama", {"rope_parameters": DEFAULT, "rope_theta": 1e6}),
        ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 2e4}, "original_max_position_embeddings": 77}),
        ("Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 60, "rope_theta": 2e4}}),
        ("Llama", {"rope_parameters": {k: v for k, v in LLAMA3.items() if not k.startswith("orig")}}),
        ("Qwen3", {"rope_parameters": {**DEFAULT, "factor": 3.0}}),
        ("Qwen3", {"rope_parameters": ABSENT, "rope_theta": ABSENT}),
        ("Qwen3-MoE", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}),
        ("Qwen3-Next", {"rope_parameters": DEFAULT}),
        ("Qwen3-Next", {"rope_parameters": DEFAULT, "partial_rotary_factor": 0.75}),
        ("Qwen3-Next", {"rope_parameters": DEFAULT, "partial_rotary_factor": None}),
        ("Qwen3-Next", {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.75}),
        ("Qwen3-Next", {"rope_parameters": ABSENT, "partial_rotary_factor": 0.75, "rope_theta": 1e5}),
        ("Qwen3.5", {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 1]}, "rope_theta": 1e6}),
        ("Qwen3.5-MoE", {"rope_parameters": ABSENT}),
    ],
)
def test_the_frequencies_are_those_of_transformers(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = _config(name, fields)
    theirs, expected = _theirs(tmp_path, config)
    ours = find_family(config).parse(config)
    assert (ours.rope_scaling is not None) == (theirs.rope_parameters["rope_type"] == "llama3")
    torch.testing.assert_close(_frequencies(ours), expected.double(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", ["Qwen3-VL", "Qwen3-VL-MoE", "Qwen3.5-VL"])
@pytest.mark.parametrize(
    ("text", "outer"),
    [
        ({"rope_parameters": ABSENT}, {"rope_theta": 777.0}),
        ({"rope_parameters": ABSENT, "rope_theta": 5e6, "rope_scaling": {"rope_type": "default"}}, {}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": ABSENT}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
    ],
)
def test_the_outer_config_ties_and_the_text_config_rotates(
    name: str, text: dict[str, Any], outer: dict[str, Any], tmp_path: Path
) -> None:
    config = config_json(case(name).write(tmp_path))
    for part, fields in ((config, outer), (config["text_config"], text)):
        part.update(fields)
        for key in [key for key, value in part.items() if value is ABSENT]:
            del part[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    ours = find_family(config).parse(config)
    assert ours.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
    expected = model.model.language_model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(_frequencies(ours), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("case", [case for case in CASES if not case.outer], ids=lambda case: case.name)
def test_the_frequencies_of_every_family(case: Any, tmp_path: Path) -> None:
    config = json.loads(case.text_config().to_json_string(use_diff=True))
    _, expected = _theirs(tmp_path, config)
    torch.testing.assert_close(_frequencies(find_family(config).parse(config)), expected.double(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Qwen3", {"rope_scaling": YARN}, r"Qwen3 config is not supported: rope_type='yarn' \(expected 'default'\)"),
        ("Qwen3.5", {"rope_scaling": {"type": "mrope"}}, "rope_type='mrope'"),
        ("Llama", {"rope_parameters": {"rope_type": None, "rope_theta": 2e4}}, "rope_type=None"),
        ("Llama", {"rope_parameters": {"full_attention": DEFAULT}}, r"each type of layer \(full_attention\)"),
        (
            "Qwen3",
            {"rope_scaling": {"full_attention": DEFAULT, "sliding_attention": YARN}},
            "json: rope_scaling",
        ),
        ("Llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta must be a number, got null"),
        ("Llama", {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (
            "Qwen3",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5, expected 1: models of this type rotate whole heads",
        ),
        ("Qwen3-Next", {"rope_parameters": {**DEFAULT, "partial_rotary_factor": None}}, "partial_rotary_factor must"),
        ("Qwen3-Next", {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 1.5}}, "rotates 18 values"),
        ("Qwen3-Next", {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.05}}, "rotates 0 values"),
        ("Llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a finite number above 0"),
        ("Llama", {"rope_parameters": {**LLAMA3, "factor": 0}}, "factor must be a finite number above 0"),
        ("Llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1}}, "is not above low_freq_factor=1.5"),
        ("Llama", {"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, got 'None'"),
        ("Llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
    ],
)
def test_what_no_model_of_transformers_has_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    config = _config(name, fields)
    with pytest.raises(ValueError, match=message):
        find_family(config).parse(config)
