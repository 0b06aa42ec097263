"""A live model on a GPU into a real vLLM on the same GPU: log-probs equal those of a fresh load, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp32 import import_checkpoint, model_provider
from megatron_fp32.models.provider import cpu_overrides
from megatron_fp32.streaming import HuggingFaceDirectory, Receipt, VllmOptions, VllmSink, WeightStreamer
from megatron_fp32.testing.cpu import model_parallel, single_process
from tests.checkpoint.layouts import load
from tests.engine.server import EngineServer
from tests.families import Case, case

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 256}
HYBRID: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
SHARED: dict[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 256}
IDS = [3, 141, 59, 26, 53, 58, 97, 93, 238, 462]
BASE = (
    "--gpu-memory-utilization", "0.3", "--hf-overrides", json.dumps({"head_dtype": "float32"}),
    "--weight-transfer-config", json.dumps({"backend": "megatron_fp32"}),
)  # fmt: skip
GDN = ("--additional-config", json.dumps({"gdn_prefill_backend": "triton"}))


def sized(name: str, **fields: Any) -> Case:
    found = case(name)
    return dataclasses.replace(found, fields={**found.fields, **SIZES, **fields})


def server(model: Path, flags: Sequence[str]) -> EngineServer:
    return EngineServer(
        model, flags=[*BASE, *flags], plugins=["megatron_fp32.vllm_plugin:register"], timeout=240,
        environment={"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"},
    )  # fmt: skip


def pushed(case: Case, root: Path, *, fp8: str | None, flags: Sequence[str]) -> tuple[Receipt, list[float]]:
    """The receipt of a push into an engine of other weights, and the engine's log-probs afterwards."""
    hf, other = case.write(root / "hf", seed=1), case.write(root / "other", seed=2)
    vision: Any = "carry" if case.outer else "refuse"
    import_checkpoint(hf, root / "imported", vision=vision)
    import_checkpoint(other, root / "other-imported", vision=vision)
    overrides = {**cpu_overrides(), "deterministic_mode": False}
    with single_process("nccl"), model_parallel():
        model = model_provider(hf, bf16=True, **overrides)().cuda()
        load([model], root / "other-imported")
        WeightStreamer(model, source=root / "other-imported", fp8=fp8).push(
            HuggingFaceDirectory(root / "engine"), version=0
        )
        load([model], root / "imported")
        streamer = WeightStreamer(model, source=root / "imported", fp8="like:engine" if fp8 else None)
        WeightStreamer(model, source=root / "imported", fp8=fp8).push(HuggingFaceDirectory(root / "fresh"), version=1)
        with server(root / "engine", flags) as engine:
            before = engine.logprobs(IDS)
            sink = VllmSink(engine.url, options=VllmOptions(sha256=True, timeout=100))
            receipt = streamer.push(sink, version=1)
            after = engine.logprobs(IDS)
            sink.close()
    assert before != after
    return receipt, after


@pytest.mark.parametrize(
    ("model", "fp8", "flags"),
    [
        pytest.param(sized("Qwen3, tied"), None, (), id="Qwen3, tied"),
        pytest.param(sized("Qwen3-MoE", **EXPERTS), "channelwise", (), id="Qwen3-MoE, channelwise"),
        pytest.param(sized("Qwen3-Next", **HYBRID, **SHARED), None, GDN, id="Qwen3-Next"),
    ],
)  # fmt: skip
def test_a_push_equals_a_fresh_load(model: Case, fp8: str | None, flags: tuple[str, ...], tmp_path: Path) -> None:
    receipt, after = pushed(model, tmp_path, fp8=fp8, flags=flags)
    engine = receipt.engines[0]
    assert (engine.channel, engine.rounded) == ("ipc", ())
    assert engine.workers[0]["tensors"] == receipt.tensors
    torch.cuda.empty_cache()
    with server(tmp_path / "fresh", flags) as fresh:
        assert fresh.logprobs(IDS) == after
