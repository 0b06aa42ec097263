"""What an inspection says, beside the files' own bytes and transformers' models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_fp32.checkpoint.convert import import_checkpoint
from megatron_fp32.checkpoint.inspect import inspect_checkpoint
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.config import Fp32Config
from megatron_fp32.errors import CheckpointError
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.testing.training import TrainerConfig
from megatron_fp32.weights.tensors import TensorInfo
from tests.checkpoint.support import stored_tensors
from tests.distributed import jobs
from tests.families import CASES, Case, case
from tests.qwen3_5 import write_dense, write_small

_SIZES = {"F32": 4, "BF16": 2}


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("vl")
    hf = case("Qwen3.5-VL").write(root / "hf")
    import_checkpoint(hf, root / "megatron", vision="carry")
    return hf, root / "megatron"


class TestHuggingFace:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_every_family(self, tmp_path: Path, case: Case) -> None:
        hf = case.write(tmp_path / "hf")
        found, stored = inspect_checkpoint(hf), stored_tensors(hf)
        assert found.family == case.name.split(",")[0].split("-VL")[0].split(" without")[0] + (
            "-MoE" if "VL-MoE" in case.name else ""
        )
        assert (
            found.model_type
            == json.loads((hf / "config.json").read_text()).get("text_config", case.text_config().to_dict())[
                "model_type"
            ]
        )
        assert (found.kind, found.megatron, found.sidecar, found.float8) == ("huggingface", None, None, None)
        assert (found.multi_token_prediction, found.vision) == (case.mtp, bool(case.outer))
        assert found.nbytes == sum(len(content) for *_, content in stored.values())
        assert found.parameters == sum(len(content) // _SIZES[dtype] for dtype, _, content in stored.values())
        assert set(found.fp32_tensors) == {name for name, (dtype, *_) in stored.items() if dtype == "F32"}
        assert dict(found.files) == {"model.safetensors": (hf / "model.safetensors").stat().st_size}

    def test_totals_by_dtype(self, tmp_path: Path) -> None:
        tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.zeros(2)}
        save_file(tensors, tmp_path / "model.safetensors")
        found = inspect_checkpoint(tmp_path)
        assert found.as_json()["by_dtype"] == {
            "F32": {"tensors": 2, "parameters": 17, "nbytes": 68},
            "BF16": {"tensors": 1, "parameters": 7, "nbytes": 14},
        }
        assert (found.family, found.model_type) == (None, None)

    def test_a_family_that_is_not_known(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        found = inspect_checkpoint(tmp_path)
        assert (found.family, found.model_type) == (None, "gpt2")

    @pytest.mark.parametrize(
        ("scheme", "told"),
        [
            ("blockwise", "blockwise, scales fp32"),
            ("channelwise", "channelwise, scales"),
            ("modelopt", "modelopt, scales"),
        ],
    )
    def test_float8(self, tmp_path: Path, scheme: str, told: str) -> None:
        write_dense(tmp_path / "hf")
        quantize_checkpoint(tmp_path / "hf", tmp_path / "fp8", scheme)
        found = inspect_checkpoint(tmp_path / "fp8")
        assert found.float8 is not None
        assert found.float8.startswith(told)
        codes = sum(
            shape[0] * shape[1] for dtype, shape, _ in stored_tensors(tmp_path / "fp8").values() if dtype == "F8_E4M3"
        )
        assert found.by_dtype[torch.float8_e4m3fn].nbytes == codes > 0

    def test_float8_without_scales_is_told(self, tmp_path: Path) -> None:
        save_file({"a.weight": torch.zeros(3, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
        found = inspect_checkpoint(tmp_path).float8
        assert found is not None
        assert found.startswith("unknown: ")
        assert "a.weight" in found

    def test_a_source_means_nothing_here(self, vl: tuple[Path, Path]) -> None:
        hf, imported = vl
        with pytest.raises(ValueError, match=r"source must be left out, because .* a Megatron checkpoint"):
            inspect_checkpoint(hf, source=imported)

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_a_damaged_configuration(self, tmp_path: Path, content: str) -> None:
        save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            inspect_checkpoint(tmp_path)


class TestMegatron:
    def test_an_import(self, vl: tuple[Path, Path]) -> None:
        hf, imported = vl
        found, stored = inspect_checkpoint(imported), stored_tensors(hf)
        text = {name: entry for name, entry in stored.items() if not name.startswith("model.visual.")}
        assert (found.kind, found.family, found.model_type) == ("megatron", "Qwen3.5", "qwen3_5_text")
        assert (found.multi_token_prediction, found.vision) == (True, True)
        assert found.path == imported / "release"
        assert found.nbytes == sum(len(content) for *_, content in text.values())
        assert found.tensors["decoder.layers.0.self_attention.A_log"] == TensorInfo(dtype=torch.float32, shape=(6,))
        assert found.megatron is not None
        assert (found.megatron.iteration, found.megatron.release, found.megatron.optimizer) == (None, True, False)
        assert found.sidecar is not None
        assert found.sidecar.path == imported / "hf_source"
        assert (found.sidecar.tensors, found.sidecar.carried) == (len(text), len(stored) - len(text))
        assert dict(found.files) == {p.name: p.stat().st_size for p in (imported / "release").glob("*.distcp")}
        json.dumps(found.as_json(), allow_nan=False)

    def test_stacked_layers_and_parts(self, tmp_path: Path) -> None:
        for name, stacked in (("Llama", True), ("Qwen3-Next", False)):
            import_checkpoint(case(name).write(tmp_path / name), tmp_path / f"{name}-megatron", mtp="drop")
            found = inspect_checkpoint(tmp_path / f"{name}-megatron")
            assert found.megatron is not None
            assert found.megatron.stacked_layers == stacked
            assert not found.multi_token_prediction

    def test_mtp_that_is_carried(self, tmp_path: Path) -> None:
        import_checkpoint(case("Qwen3-Next").write(tmp_path / "hf"), tmp_path / "megatron", mtp="carry")
        assert inspect_checkpoint(tmp_path / "megatron").multi_token_prediction

    def test_what_a_trainer_saved(self, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
        saved = tmp_path / "iter_0000012"
        saved.mkdir()
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
        ranks(2).run(jobs.train_and_save, TrainerConfig(), {"tensor": 2}, 1, saved, None, {"fp32": Fp32Config()})
        for path in (saved, tmp_path):
            found = inspect_checkpoint(path)
            assert found.path == saved
            assert (found.family, found.model_type, found.sidecar) == (None, None, None)
            assert found.megatron is not None
            assert (found.megatron.iteration, found.megatron.release) == (12, False)
            assert found.megatron.optimizer
            assert found.megatron.other_entries > 10
            assert {info.dtype for info in found.tensors.values()} == {torch.float32, torch.bfloat16}
            assert {name.rsplit(".", 2)[-1] for name in found.fp32_tensors} == {"A_log", "weight"}
            assert not any(name.startswith("optimizer.") for name in found.tensors)
            assert len(found.files) > 1

    def test_a_source_tells_the_family(self, vl: tuple[Path, Path], tmp_path: Path) -> None:
        _, imported = vl
        shutil.copytree(imported / "release", tmp_path / "elsewhere")
        assert inspect_checkpoint(tmp_path / "elsewhere").family is None
        found = inspect_checkpoint(tmp_path / "elsewhere", source=imported)
        assert (found.family, found.vision) == ("Qwen3.5", True)
        assert found.megatron is not None
        assert (found.megatron.iteration, found.megatron.release) == (None, False)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        inspect_checkpoint(tmp_path)


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_small(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron")

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(torch, "load", load)
    for path in (tmp_path / "megatron" / "release").glob("*.distcp"):
        path.write_bytes(b"")
    assert inspect_checkpoint(tmp_path / "megatron").parameters == inspect_checkpoint(hf).parameters
