"""What users see when a checkpoint holds other tensors, or another model, than expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint.support import rewrite
from tests.qwen3_5 import write_small
from tests.support import refused


class TestNames:
    @pytest.mark.parametrize(
        ("prefix", "remedy"),
        [
            ("base_model.model.", "merge_and_unload"),
            ("module.", "DistributedDataParallel"),
            ("_orig_mod.", "torch.compile"),
            ("transformer.", "Rename its tensors"),
        ],
    )
    def test_another_prefix(self, hf: Path, tmp_path: Path, prefix: str, remedy: str) -> None:
        rewrite(hf, lambda tensors: {prefix + name: t for name, t in tensors.items()})
        message = refused("import", hf, tmp_path / "out")
        assert f"{hf}: this checkpoint does not have a text model" in message
        assert f"{prefix}model.embed_tokens.weight" in message
        assert f"start with '{prefix}model.', expected 'model.'" in message
        assert remedy in message

    def test_no_embedding(self, hf: Path, tmp_path: Path) -> None:
        rewrite(hf, lambda _: {"encoder.weight": torch.ones(2)})
        message = refused("import", hf, tmp_path / "out")
        assert f"{hf}: this checkpoint does not have a text model" in message
        assert "its tensors are encoder.weight" in message

    def test_an_unsupported_family(self, hf: Path, tmp_path: Path) -> None:
        config = json.loads((hf / "config.json").read_text())
        changed = {**config, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        (hf / "config.json").write_text(json.dumps(changed))
        message = refused("import", hf, tmp_path / "out")
        for part in (f"{hf}: ", "'gemma3_text'", "Gemma3ForCausalLM", "Qwen3-MoE (qwen3_moe,", "Llama (llama)"):
            assert part in message
        assert "megatron_fp32/weights/families/ and list it in registry.py" in message

    @pytest.mark.parametrize("name", ["mtp.layers.x.norm.weight", "mtp.layers.-1.norm.weight", "mtp.layers."])
    def test_an_mtp_layer_without_a_number(self, tmp_path: Path, name: str) -> None:
        hf = write_small(tmp_path / "hf")
        rewrite(hf, lambda tensors: {**tensors, name: torch.ones(2)})
        message = refused("import", hf, tmp_path / "out")
        assert (
            f"{hf}: the tensor name {name!r} has no layer number: expected mtp.layers.N., where N is a number"
            in message
        )

    def test_a_shape_in_the_sidecar(self, megatron: Path, tmp_path: Path) -> None:
        path, name = megatron / "hf_source/source.json", "model.layers.0.mlp.gate_proj.weight"
        content = json.loads(path.read_text())
        content["tensors"][name]["shape"] = [3, 4]
        path.write_text(json.dumps(content))
        message = refused("export", megatron, tmp_path / "out")
        assert f"{path} gives {name!r} the shape (3, 4)" in message
        assert "gives it the shape (22, 36)" in message
        assert not list(tmp_path.glob(".out*"))
