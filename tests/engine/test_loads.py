"""A fresh vLLM computes what transformers computes in fp32 from the same files.

Other tests of this folder compare an updated engine with a fresh one. These say that a fresh one is right.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32 import quantize_checkpoint
from tests.engine.server import BLOCK_FP8, VISIBLE_WEIGHTS, EngineServer
from tests.families import Case, case

pytestmark = pytest.mark.engine

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""Attention of vLLM's CPU backend takes few head sizes. Blocks of 128 fill each part of a fused projection."""
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
"""vLLM's gated delta net refuses heads of 32 on a CPU."""
WIDTHS = {"intermediate_size": 384, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}

TOKENS = [int(token) for token in torch.randint(0, 120, (48,), generator=torch.Generator().manual_seed(1))]

FACTOR = 2
"""The engine may be so many times as far from fp32 as transformers in bf16. Both round each sum and each activation."""


def engine_case(name: str) -> Case:
    """A case of tests/families.py with sizes that vLLM takes."""
    chosen = case(name)
    fields = {**chosen.fields, **SIZES, **{key: width for key, width in WIDTHS.items() if key in chosen.fields}}
    if "linear_key_head_dim" in fields:
        fields |= LINEAR
    return dataclasses.replace(chosen, fields=fields)


def logprobs(model: torch.nn.Module, dtype: torch.dtype) -> Tensor:
    """transformers' log-probs of all tokens but the first, with layers in a dtype and the head in fp32."""
    ids = torch.tensor(TOKENS)
    head = model.get_output_embeddings().weight.detach().float().clone()  # `to` changes the parameter itself
    with torch.no_grad():
        hidden = model.to(dtype).get_decoder()(ids[None]).last_hidden_state[0, :-1]
        rows = (hidden.float() @ head.T).double().log_softmax(-1)
    return rows.gather(1, ids[1:, None])[:, 0]


def check_engine(engine: EngineServer, model: torch.nn.Module) -> None:
    """The engine is not much further from transformers in fp32 than transformers in bf16 is."""
    truth = logprobs(model, torch.float32)
    found = torch.tensor(engine.logprobs(TOKENS), dtype=torch.float64)
    error, own = ((rows - truth).abs().max().item() for rows in (found, logprobs(model, torch.bfloat16)))
    print(f"{engine.model.name}: ready after {engine.seconds_to_start:.0f} s, {error:.1e} nats from fp32 ({own:.1e})")
    assert error < FACTOR * own


def dequantized(directory: Path) -> dict[str, Tensor]:
    """What the FP8 tensors of a checkpoint of one file mean, in fp32."""
    tensors = load_file(directory / "model.safetensors")
    values: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if weight.dtype != torch.float8_e4m3fn:
            continue
        if (blocks := tensors.get(f"{name}_scale_inv")) is not None:
            scale = blocks.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            scale = scale[: weight.shape[0], : weight.shape[1]]
        else:
            scale = tensors[f"{name}_scale"].float()
        values[name] = weight.float() * scale
    return values


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3-MoE", "Qwen3.5, tied", "Qwen3.5-MoE, tied"])
def test_a_fresh_engine_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    chosen = engine_case(name)
    source = chosen.write(tmp_path / name)
    with EngineServer(source) as engine:
        check_engine(engine, chosen.load(source))
        assert len(engine.checksums()) > 20
        assert engine.weight_info() == {"weight_version": "default"}
        assert len(engine.generate(TOKENS[:5], 4)) == 4


@pytest.mark.parametrize(
    ("name", "scheme", "plugins"),
    [
        ("Qwen3.5", "channelwise", [VISIBLE_WEIGHTS]),
        ("Qwen3, tied", "blockwise", [VISIBLE_WEIGHTS, BLOCK_FP8]),
    ],
)
def test_an_engine_loads_what_quantize_writes(name: str, scheme: str, plugins: list[str], tmp_path: Path) -> None:
    chosen = engine_case(name)
    source, quantized = chosen.write(tmp_path / name), tmp_path / f"{name}, {scheme}"
    quantize_checkpoint(source, quantized, scheme)
    model = chosen.load(source)
    values = {name: value for name, value in dequantized(quantized).items() if not name.startswith("mtp.")}
    assert values
    assert model.load_state_dict(values, strict=False).unexpected_keys == []
    with EngineServer(quantized, plugins=plugins) as engine:
        check_engine(engine, model)
