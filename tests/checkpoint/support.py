"""Small checkpoints, and what their files hold, read without the package."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.formats.torch_dist_writer import TorchDistWriter
from megatron_fp32.testing.qwen3_5 import write_qwen3_5
from tests.families import Case

SMALL: dict[str, Any] = {
    "vocab_size": 57,
    "hidden_size": 27,
    "intermediate_size": 21,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 9,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 22,
}
"""Sizes that no power of two divides, and heads that three ranks can share."""

EVEN: dict[str, Any] = {
    **SMALL,
    "intermediate_size": 22,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""Heads that two ranks can share; the vocabulary is still odd."""

A_LOG = "model.layers.0.linear_attn.A_log"
NORM = "model.layers.0.linear_attn.norm.weight"

StoredTensor = tuple[str, list[int], bytes]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Dtype, shape and bytes of every tensor, cut out of the files by hand."""
    found: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        content = path.read_bytes()
        data = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:data]).items():
            if name != "__metadata__":
                assert name not in found
                start, end = entry["data_offsets"]
                found[name] = (entry["dtype"], entry["shape"], content[data + start : data + end])
    return found


def assets(directory: Path) -> dict[str, bytes]:
    """Every file that is no weights."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if ".safetensors" not in p.name}


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in directory.rglob("*")}


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Put other tensors into a checkpoint of one file."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return directory


def write_small(directory: Path, *, all_bf16: bool = False, **fields: Any) -> Path:
    """A checkpoint of `SMALL`; with `all_bf16` its F32 tensors are BF16, as in Qwen3.6."""
    write_qwen3_5(directory, **{**SMALL, **fields})
    if all_bf16:
        rewrite(directory, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    return directory


def bits(tensor: Tensor) -> Tensor:
    """The bytes, for comparing bit for bit."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_parity(ours: Tensor, case: Case, hf: Path, tokens: Tensor) -> None:
    """Not farther from transformers in float64 than a few times transformers in fp32 is."""
    with torch.no_grad():
        exact = case.load(hf, torch.float64)(tokens).logits
        theirs = case.load(hf, torch.float32)(tokens).logits
    assert exact.std() > 1  # small logits would hide a wrong body
    assert (ours - exact).abs().max() < 4 * (theirs - exact).abs().max()


def resave(directory: Path, out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A Megatron checkpoint with other tensors, as a trainer somewhere else might have left it."""
    reader = TorchDistReader(directory)
    out.mkdir()
    with TorchDistWriter(out) as writer:
        for name, tensor in change({name: reader.read(name) for name in reader.tensors}).items():
            writer.write(name, tensor)
        writer.finish({})
    return out


def example_tensors() -> dict[str, Tensor]:
    random = {
        "f32": torch.randint(0, 256, (3, 7, 4), dtype=torch.uint8).view(torch.float32).squeeze(-1),
        "bf16": torch.randint(0, 256, (5, 2), dtype=torch.uint8).view(torch.bfloat16),
        "fp8": torch.randint(0, 256, (9,), dtype=torch.uint8).view(torch.float8_e4m3fn),
        "i64": torch.randint(-(2**40), 2**40, (2, 3)),
    }
    return {**random, "transposed": torch.arange(12.0).reshape(3, 4).t(), "scalar": torch.tensor(1.5)}


def write_torch_dist(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    with TorchDistWriter(directory) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.write_object("module._extra_state/shard_0_1", torch.empty(0, dtype=torch.uint8))
        writer.finish({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}})
    return directory


def change_metadata(directory: Path, change: Callable[[Any], object]) -> None:
    path = directory / ".metadata"
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))
