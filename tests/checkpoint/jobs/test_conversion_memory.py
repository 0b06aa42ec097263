"""Memory of conversions, by the operating system's account: three times the largest tensor, however large the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fp32.checkpoint.formats.safetensors_writer import HuggingFaceWriter
from megatron_fp32.weights.model_map import map_model
from megatron_fp32.weights.tensors import TensorInfo

CONFIG = {
    "model_type": "llama", "vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 16384,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "num_hidden_layers": 6, "max_position_embeddings": 128,
}  # fmt: skip
LARGEST = 65536 * 1024 * 2

SCRIPT = """
import sys
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.quantize import quantize_checkpoint

def high_water():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

source, out = sys.argv[1:]
before = high_water()
for convert in (
    lambda: import_checkpoint(source, out + "/megatron"),
    lambda: export_checkpoint(out + "/megatron", out + "/hf"),
    lambda: quantize_checkpoint(source, out + "/fp8", "blockwise"),
):
    convert()
    print(high_water() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    plan = map_model(CONFIG, ["model.embed_tokens.weight", "lm_head.weight"], stacked=False)
    infos = {
        spec.name: TensorInfo(dtype=torch.bfloat16, shape=spec.shape)
        for mapping in plan.mappings
        for spec in mapping.hf
    }
    writer = HuggingFaceWriter(directory, infos)
    for name, info in infos.items():
        writer.write(name, torch.ones(info.shape, dtype=torch.bfloat16))
    writer.finish()
    return directory


def test_it_is_that_of_the_largest_tensor(large: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(large), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=280)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.split()]
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 6 * LARGEST
    assert len(peaks) == 3
    assert max(peaks) < 3 * LARGEST
