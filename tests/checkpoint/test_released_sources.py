"""What released checkpoints hold besides what transformers writes today, and what is refused beside full weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.formats.huggingface import INDEX, HuggingFaceReader
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.inspect import inspect_checkpoint
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.cli import main
from megatron_fp32.errors import CheckpointError
from tests.checkpoint.support import resave, rewrite, statuses_of, stored_tensors
from tests.families import case

HEAD, EMBEDDING = "lm_head.weight", "embedding.word_embeddings.weight"

Tensors = dict[str, Tensor]
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return lambda name: case(name).write(tmp_path / "hf")


def _embedding(tensors: Tensors) -> str:
    (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    return name


def _with_head(tensors: Tensors) -> Tensors:
    return {**tensors, HEAD: tensors[_embedding(tensors)].clone()}


class TestATiedHeadThatIsStored:
    @pytest.mark.parametrize("name", ["Llama, tied", "Qwen3, tied", "Qwen3.5, tied", "Qwen3.5-MoE, tied"])
    def test_every_byte_comes_back(self, name: str, write: Write, tmp_path: Path) -> None:
        hf = rewrite(write(name), _with_head)
        import_checkpoint(hf, tmp_path / "megatron")
        assert "output_layer.weight" not in TorchDistReader(tmp_path / "megatron").tensors
        report = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
        assert stored_tensors(tmp_path / "out") == stored_tensors(hf)
        assert report.unchanged == report.tensors
        assert verify_checkpoints(hf, tmp_path / "megatron").agrees()

    def test_a_trained_embedding_leaves_under_both_names(self, write: Write, tmp_path: Path) -> None:
        hf = rewrite(write("Qwen3, tied"), _with_head)
        import_checkpoint(hf, tmp_path / "megatron")

        def change(tensors: Tensors) -> Tensors:
            tensors[EMBEDDING][3, 5] += 1
            return tensors

        trained = resave(tmp_path / "megatron", tmp_path / "trained", change)
        export_checkpoint(trained, tmp_path / "out", source=tmp_path / "megatron")
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        for name in (HEAD, _embedding(tensors)):
            assert torch.equal(tensors[name], TorchDistReader(trained).read(EMBEDDING)), name
        found = statuses_of(verify_checkpoints(hf, trained, source=tmp_path / "megatron"))
        assert found == {HEAD: "values", _embedding(tensors): "values"}

    def test_one_with_other_values_is_refused(self, write: Write, tmp_path: Path) -> None:
        def change(tensors: Tensors) -> Tensors:
            head = tensors[_embedding(tensors)].clone()
            head.view(torch.int16)[56, 35] ^= 1
            return {**tensors, HEAD: head}

        hf = rewrite(write("Qwen3, tied"), change)
        message = rf"{hf}: {HEAD} and model\.embed_tokens\.weight have different values, but config\.json says"
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(hf, tmp_path / "megatron")
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    def test_one_of_another_dtype_is_refused(self, write: Write, tmp_path: Path) -> None:
        hf = rewrite(write("Qwen3, tied"), lambda t: {**t, HEAD: t[_embedding(t)].float()})
        with pytest.raises(CheckpointError, match=r"cannot hold the dtypes .* of .*lm_head\.weight"):
            import_checkpoint(hf, tmp_path / "megatron")


class TestStoredFrequencies:
    @pytest.mark.parametrize("name", ["Llama", "Llama without scaling", "Qwen3", "Qwen3.5"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_those_of_the_config_come_back(self, name: str, dtype: torch.dtype, write: Write, tmp_path: Path) -> None:
        hf = write(name)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf))
        stored = model.model.rotary_emb.inv_freq.to(dtype)
        names = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": stored.clone() for i in range(3)}
        rewrite(hf, lambda tensors: {**tensors, **names})
        report = import_checkpoint(hf, tmp_path / "megatron")
        assert set(report.carried) == names.keys()
        assert report.other_frequencies == ()
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
        assert stored_tensors(tmp_path / "out") == stored_tensors(hf)
        assert verify_checkpoints(hf, tmp_path / "megatron").agrees()

    @pytest.mark.parametrize(
        "stored",
        [
            torch.ones(6),
            torch.ones(5),
            torch.ones(6, dtype=torch.int64),
            torch.ones(6, dtype=torch.uint8).view(torch.float8_e8m0fnu),
            torch.ones(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        ],
        ids=["values", "shape", "integers", "F8", "F4"],
    )
    def test_others_come_back_and_are_named(self, stored: Tensor, write: Write, tmp_path: Path) -> None:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        hf = rewrite(write("Llama without scaling"), lambda tensors: {**tensors, name: stored})
        report = import_checkpoint(hf, tmp_path / "megatron", text_only=True)
        assert report.other_frequencies == report.carried == (name,)
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
        assert stored_tensors(tmp_path / "out") == stored_tensors(hf)
        result = CliRunner().invoke(main, ["import", str(hf), str(tmp_path / "again")])
        assert result.exit_code == 0
        assert "that differ from those of config.json" in result.stdout
        assert name in result.stdout

    def test_scaled_frequencies_are_not_those_of_a_config_without_scaling(self, write: Write, tmp_path: Path) -> None:
        hf = write("Llama")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf))
        name = "model.rotary_emb.inv_freq"
        rewrite(hf, lambda tensors: {**tensors, name: model.model.rotary_emb.inv_freq})
        assert import_checkpoint(hf, tmp_path / "megatron").other_frequencies == ()
        config = json.loads((hf / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
        (hf / "config.json").write_text(json.dumps(config))
        assert import_checkpoint(hf, tmp_path / "unscaled").other_frequencies == (name,)


@pytest.mark.parametrize("prefix", ["model.language_model.visual.", "visual."])
@pytest.mark.parametrize("name", ["Qwen3-VL", "Qwen3.5-VL-MoE"])
def test_vision_under_another_name_is_vision(prefix: str, name: str, write: Write, tmp_path: Path) -> None:
    hf = rewrite(
        write(name), lambda tensors: {n.replace("model.visual.", prefix, 1): tensor for n, tensor in tensors.items()}
    )
    vision = {name for name in stored_tensors(hf) if name.startswith(prefix)}
    assert vision
    assert inspect_checkpoint(hf).vision
    with pytest.raises(CheckpointError, match=f"{len(vision)} tensors of its vision part"):
        import_checkpoint(hf, tmp_path / "megatron")
    assert set(import_checkpoint(hf, tmp_path / "megatron", vision="carry").carried) == vision
    assert set(import_checkpoint(hf, tmp_path / "text", text_only=True).left_out) >= vision
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert stored_tensors(tmp_path / "out") == stored_tensors(hf)
    assert verify_checkpoints(hf, tmp_path / "megatron").agrees()
    assert verify_checkpoints(hf, tmp_path / "text", text_only=True).agrees()


class TestOneFileAndAnIndex:
    def _index(self, hf: Path, files: dict[str, str]) -> Path:
        (hf / INDEX).write_text(json.dumps({"weight_map": files}))
        return hf

    def test_an_index_that_names_the_file(self, write: Write, tmp_path: Path) -> None:
        hf = write("Qwen3")
        self._index(hf, dict.fromkeys(stored_tensors(hf), "model.safetensors"))
        import_checkpoint(hf, tmp_path / "megatron")
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
        assert stored_tensors(tmp_path / "out") == stored_tensors(hf)

    def test_an_index_that_names_it_among_others(self, write: Write) -> None:
        hf = write("Qwen3")
        expected = stored_tensors(hf)
        save_file({HEAD: load_file(hf / "model.safetensors")[HEAD]}, hf / "head.safetensors")
        rewrite(hf, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != HEAD})
        places = {name: "head.safetensors" if name == HEAD else "model.safetensors" for name in expected}
        with HuggingFaceReader(self._index(hf, places)) as reader:
            assert reader.tensors.keys() == expected.keys()
        (hf / "another.safetensors").write_bytes(b"not of this checkpoint")
        assert inspect_checkpoint(hf).files.keys() == {"model.safetensors", "head.safetensors"}

    def test_an_index_that_does_not_name_it(self, write: Write) -> None:
        hf = write("Qwen3")
        self._index(hf, dict.fromkeys(stored_tensors(hf), "other.safetensors"))
        (hf / "other.safetensors").write_bytes((hf / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match="remove the one that does not belong to the checkpoint"):
            HuggingFaceReader(hf)

    def test_an_index_that_names_fewer_tensors(self, write: Write) -> None:
        hf = write("Qwen3")
        names = sorted(stored_tensors(hf))
        self._index(hf, dict.fromkeys(names[1:], "model.safetensors"))
        with pytest.raises(CheckpointError, match="has tensors that the index does not list for it"):
            HuggingFaceReader(hf)


@pytest.mark.parametrize(
    "file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapter_model-00001-of-2.bin"]
)
def test_an_adapter_beside_full_weights_is_refused(file: str, write: Write, tmp_path: Path) -> None:
    hf = write("Qwen3")
    (hf / file).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{hf} holds an adapter \({file}\): merge it"):
        import_checkpoint(hf, tmp_path / "megatron")
    with pytest.raises(CheckpointError, match=rf"{hf} holds an adapter \({file}\): merge it"):
        quantize_checkpoint(hf, tmp_path / "fp8", "blockwise")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    result = CliRunner().invoke(main, ["import", str(hf), str(tmp_path / "megatron")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert inspect_checkpoint(hf).adapter == (file,)
    result = CliRunner().invoke(main, ["inspect", str(hf)])
    assert f"{file}; transformers adds it" in result.stdout
