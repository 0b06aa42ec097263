"""Every family from Hugging Face to Megatron and back, without Megatron: bytes, parts, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.formats.torch_dist_writer import TorchDistWriter
from megatron_fp32.errors import CheckpointError
from tests.checkpoint.support import assets, rewrite, stored_tensors
from tests.conftest import Families
from tests.families import CASES, Case, case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_byte_comes_back(families: Families, tmp_path: Path, case: Case) -> None:
    hf = families(case)[0]
    there = import_checkpoint(hf, tmp_path / "megatron", vision="carry" if case.outer else "refuse")
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    stored = stored_tensors(hf)
    assert stored_tensors(tmp_path / "hf") == stored
    assert assets(tmp_path / "hf") == assets(hf)
    assert report.unchanged == report.tensors == len(stored) == there.tensors + len(there.carried)
    assert (report.widened, report.rounded) == ((), ())


VL = case("Qwen3.5-VL-MoE")


def _parts(hf: Path) -> tuple[set[str], set[str]]:
    names = stored_tensors(hf)
    return {n for n in names if n.startswith("model.visual.")}, {n for n in names if n.startswith("mtp.")}


class TestParts:
    def test_vision_is_refused_with_the_ways_out(self, families: Families, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"vision part.*model\.visual\..*vision='carry'.*vision='drop'"):
            import_checkpoint(families(VL)[0], tmp_path / "megatron")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("mtp", ["convert", "carry"])
    def test_what_is_carried_comes_back(self, families: Families, tmp_path: Path, mtp: Any) -> None:
        hf = families(VL)[0]
        vision_names, mtp_names = _parts(hf)
        report = import_checkpoint(hf, tmp_path / "megatron", vision="carry", mtp=mtp)
        assert set(report.carried) == vision_names | (mtp_names if mtp == "carry" else set())
        assert report.left_out == ()
        stored = TorchDistReader(tmp_path / "megatron").tensors
        assert any(name.startswith("mtp.") for name in stored) is (mtp == "convert")
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
        assert stored_tensors(tmp_path / "hf") == stored_tensors(hf)

    @pytest.mark.parametrize("options", [{"vision": "drop", "mtp": "drop"}, {"text_only": True}], ids=str)
    def test_what_is_dropped_is_named_and_stays_away(self, families: Families, tmp_path: Path, options: Any) -> None:
        hf = families(VL)[0]
        vision_names, mtp_names = _parts(hf)
        report = import_checkpoint(hf, tmp_path / "megatron", **options)
        assert set(report.left_out) == vision_names | mtp_names
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
        rest = {n: t for n, t in stored_tensors(hf).items() if n not in report.left_out}
        assert stored_tensors(tmp_path / "hf") == rest

    def test_a_model_trained_without_its_mtp_layer_is_refused(self, families: Families, tmp_path: Path) -> None:
        import_checkpoint(families(VL)[0], tmp_path / "megatron", vision="carry")
        trained = _resave(tmp_path / "megatron", tmp_path / "trained", lambda n, t: None if n.startswith("mtp.") else t)
        with pytest.raises(CheckpointError, match=r"missing tensors: mtp\.layers\.0.*mtp='carry'.*source=DIR"):
            export_checkpoint(trained, tmp_path / "hf", source=tmp_path / "megatron")
        import_checkpoint(families(VL)[0], tmp_path / "carried", vision="carry", mtp="carry")
        export_checkpoint(trained, tmp_path / "hf", source=tmp_path / "carried")
        assert stored_tensors(tmp_path / "hf") == stored_tensors(families(VL)[0])

    def test_what_is_carried_is_checked(self, families: Families, tmp_path: Path) -> None:
        import_checkpoint(families(VL)[0], tmp_path / "megatron", vision="carry")
        carried = tmp_path / "megatron" / "hf_source" / "carried"
        name = min(stored_tensors(carried))
        rewrite(carried, lambda tensors: {**tensors, name: tensors[name] + 1})
        with pytest.raises(CheckpointError, match=rf"carried is damaged: the values of '{name}' have changed"):
            export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
        rewrite(carried, lambda tensors: {n: t for n, t in tensors.items() if n != name})
        with pytest.raises(CheckpointError, match="carried is damaged: its tensors"):
            export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


class TestExperts:
    @pytest.mark.parametrize("name", ["Qwen3.5-MoE", "Qwen3-MoE"])
    def test_no_more_than_one_is_read_at_a_time(
        self, families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        sizes: list[int] = []
        hf = families(case(name))[0]
        for owner in (HuggingFaceReader, TorchDistReader):
            monkeypatch.setattr(owner, "read", _measured_experts(owner.read, sizes))
        import_checkpoint(hf, tmp_path / "megatron")
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
        assert max(sizes) == 2 * 14 * 36  # gate and up of one of the five

    def test_one_of_another_dtype_is_refused(self, families: Families, tmp_path: Path) -> None:
        own = Path(shutil.copytree(families(case("Qwen3-MoE"))[0], tmp_path / "own"))
        changed = "model.layers.1.mlp.experts.3.down_proj.weight"
        rewrite(own, lambda tensors: {n: t.float() if n == changed else t for n, t in tensors.items()})
        with pytest.raises(CheckpointError, match=r"cannot hold the dtypes torch\.bfloat16, torch\.float32"):
            import_checkpoint(own, tmp_path / "megatron")

    def test_one_that_needs_fp32_widens_all_of_its_stack(self, families: Families, tmp_path: Path) -> None:
        import_checkpoint(families(case("Qwen3.5-MoE"))[0], tmp_path / "megatron")
        key = "decoder.layers.0.mlp.experts.experts.linear_fc2.weight"

        def train(name: str, tensor: Tensor) -> Tensor:
            if name != key:
                return tensor
            tensor = tensor.float()
            tensor[2] += 1e-5
            return tensor

        trained = _resave(tmp_path / "megatron", tmp_path / "trained", train)
        report = export_checkpoint(trained, tmp_path / "hf", source=tmp_path / "megatron")
        name = "model.layers.0.mlp.experts.down_proj"
        assert report.widened == (name,)
        before, after = stored_tensors(families(case("Qwen3.5-MoE"))[0]), stored_tensors(tmp_path / "hf")
        assert after[name][0] == "F32"
        values = torch.frombuffer(bytearray(after[name][2]), dtype=torch.float32)
        assert torch.equal(values.view(after[name][1]), TorchDistReader(trained).read(key))
        assert {n for n in before if before[n] != after[n]} == {name}
        assert report.unchanged == report.tensors - 1


@pytest.mark.parametrize("name", ["Llama, tied", "Qwen3-MoE"])
def test_a_trainer_may_store_layers_that_are_alike_one_by_one(families: Families, tmp_path: Path, name: str) -> None:
    """With `hetereogenous_dist_checkpoint`, for example."""
    import_checkpoint(families(case(name))[0], tmp_path / "megatron")
    reader = TorchDistReader(tmp_path / "megatron")
    (tmp_path / "trained").mkdir()
    with TorchDistWriter(tmp_path / "trained") as writer:
        for key in reader.tensors:
            rest = key.removeprefix("decoder.layers.")
            if rest == key:
                writer.write(key, reader.read(key))
                continue
            for layer in range(3):
                writer.write(f"decoder.layers.{layer}.{rest}", reader.read(key, (layer,)))
        writer.finish({})
    export_checkpoint(tmp_path / "trained", tmp_path / "hf", source=tmp_path / "megatron")
    assert stored_tensors(tmp_path / "hf") == stored_tensors(families(case(name))[0])


def _measured_experts(read: Callable[..., Tensor], sizes: list[int]) -> Callable[..., Tensor]:
    def measured(self: Any, name: str, *args: Any) -> Tensor:
        tensor = read(self, name, *args)
        if ".experts." in name:
            sizes.append(tensor.numel())
        return tensor

    return measured


def _resave(directory: Path, out: Path, change: Callable[[str, Tensor], Tensor | None]) -> Path:
    """A Megatron checkpoint with other tensors, as a trainer might have left it."""
    reader = TorchDistReader(directory)
    out.mkdir()
    with TorchDistWriter(out) as writer:
        for name in reader.tensors:
            tensor = change(name, reader.read(name))
            if tensor is not None:
                writer.write(name, tensor)
        writer.finish({})
    return out
