"""A Hugging Face checkpoint beside a Megatron one: what differs is computed here from the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.errors import CheckpointError
from megatron_fp32.models import provider
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.testing.training import Batch, Trainer, load_model
from megatron_fp32.weights.tensors import TensorInfo
from tests.checkpoint.support import (
    NORM,
    altered,
    assert_differences,
    each,
    load_tensors,
    resave,
    rewrite,
    statuses_of,
    stored_tensors,
    the_only,
    without,
)
from tests.conftest import Families
from tests.families import CASES, Case, case


class TestEveryFamily:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_an_import_equals_its_source(self, families: Families, case: Case) -> None:
        hf, imported = families(case)
        count = len(stored_tensors(hf))
        for pair in ((hf, imported), (imported, hf)):
            report = verify_checkpoints(*pair)
            assert (report.agrees(), report.compared, report.equal) == (True, count, count)
            assert report.nbytes == sum(len(content) for _, _, content in stored_tensors(hf).values())
        assert verify_checkpoints(imported, imported).agrees()

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_one_flipped_bit_is_found_in_each_tensor(self, families: Families, tmp_path: Path, case: Case) -> None:
        hf, imported = families(case)

        def flip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for at, tensor in enumerate(tensors.values()):
                bits = tensor.view(-1).view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])
                bits[at * 7919 % len(bits)] ^= 1
            return tensors

        other = altered(hf, tmp_path / "hf", flip)
        before, after = load_tensors(hf), load_tensors(other)
        reports = [verify_checkpoints(imported, other), verify_checkpoints(hf, other)]
        for report in reports:
            assert_differences(report, before, after)
            assert {d.values.count for d in report.differences if d.values} == {1}
            assert (len(report.differences), report.equal) == (len(before), 0)
        assert_differences(verify_checkpoints(other, imported), after, before)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_a_trained_checkpoint_differs_as_its_export_does(
        self, families: Families, tmp_path: Path, case: Case
    ) -> None:
        hf, imported = families(case)

        def train(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for at, tensor in enumerate(tensors.values()):
                if at % 3:
                    tensor.view(-1)[at % tensor.numel()] += 0.25
            return tensors

        trained = resave(imported, tmp_path / "trained", train)
        export_checkpoint(trained, tmp_path / "hf", source=imported)
        report = verify_checkpoints(hf, trained, source=imported)
        assert len(report.differences) > 3
        assert_differences(report, load_tensors(hf), load_tensors(tmp_path / "hf"))
        assert verify_checkpoints(trained, tmp_path / "hf", source=imported).agrees()


class TestSource:
    """What the sidecar, or the Hugging Face checkpoint in its place, says of dtypes and originals."""

    @pytest.fixture
    def bf16(self, tmp_path: Path) -> tuple[Path, Path]:
        hf = case("Qwen3.5").write(tmp_path / "bf16")
        rewrite(hf, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
        import_checkpoint(hf, tmp_path / "bf16-megatron")
        return hf, tmp_path / "bf16-megatron"

    def test_a_norm_that_cannot_be_undone_equals_its_original(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Qwen3.5"))
        norm = load_file(hf / "model.safetensors")[NORM]
        assert not torch.equal((norm - 1) + 1, norm)  # otherwise this shows nothing
        alone = resave(imported, tmp_path / "alone", lambda tensors: tensors)
        for source in (None, imported):
            assert verify_checkpoints(hf, alone, source=source).agrees()

    def test_another_original_with_the_same_stored_norm_is_found_by_the_sidecar(
        self, families: Families, tmp_path: Path
    ) -> None:
        hf, imported = families(case("Qwen3.5"))
        norm = load_file(hf / "model.safetensors")[NORM]
        twin = torch.nextafter(norm, torch.zeros(()))
        same = (twin - 1) == (norm - 1)
        assert same.any()
        other = altered(hf, tmp_path / "hf", each(**{NORM: lambda t: torch.where(same, twin, norm)}))
        difference = the_only(verify_checkpoints(other, imported))
        assert difference.values is not None
        assert (difference.name, difference.values.count) == (NORM, int(same.sum()))
        alone = resave(imported, tmp_path / "alone", lambda tensors: tensors)
        assert verify_checkpoints(other, alone).agrees()  # an import of it would give the same bytes

    def test_fp32_that_the_sources_dtype_holds_leaves_as_that(self, bf16: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = bf16
        wide = resave(imported, tmp_path / "wide", each(A_log=Tensor.float))
        for source in (None, imported):
            assert verify_checkpoints(wide, hf, source=source).agrees()
        trained = resave(imported, tmp_path / "trained", each(A_log=lambda t: t.float() + 2**-15))
        report = verify_checkpoints(hf, trained, source=imported)
        assert statuses_of(report) == {n: "values" for n in stored_tensors(hf) if n.endswith("A_log")}
        for difference in report.differences:
            assert difference.a is not None
            assert difference.b is not None
            assert (difference.a.dtype, difference.b.dtype) == (torch.bfloat16, torch.float32)

    def test_what_a_stock_model_rounded_is_named_with_its_dtype(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Qwen3.5"))
        rounded = resave(imported, tmp_path / "rounded", each(A_log=Tensor.bfloat16))
        report = verify_checkpoints(rounded, hf, source=imported)
        assert statuses_of(report) == {n: "values" for n in stored_tensors(hf) if n.endswith("A_log")}
        for difference in report.differences:
            assert difference.a is not None
            assert difference.values is not None
            assert difference.values.absolute is not None
            assert difference.a.dtype == torch.bfloat16
            stored = load_file(hf / "model.safetensors")[difference.name].double()
            assert difference.values.absolute.size == float((stored - stored.bfloat16().double()).abs().max())

    def test_one_expert_of_a_stack_in_another_dtype_shows(self, bf16: tuple[Path, Path], tmp_path: Path) -> None:
        hf = case("Qwen3-MoE, fused").write(tmp_path / "hf")
        import_checkpoint(hf, tmp_path / "megatron")
        name = "decoder.layers.mlp.experts.experts.linear_fc2.weight"

        def train(tensor: Tensor) -> Tensor:
            tensor = tensor.float()
            tensor[1, 4, 2, 3] += 2**-20
            return tensor

        trained = resave(tmp_path / "megatron", tmp_path / "trained", each(**{name: train}))
        difference = the_only(verify_checkpoints(trained, hf, source=tmp_path / "megatron"))
        assert (difference.name, difference.status) == ("model.layers.1.mlp.experts.down_proj", "values")
        assert difference.a is not None
        assert difference.values is not None
        assert difference.a.dtype == torch.float32
        assert (difference.values.count, difference.values.first) == (1, (4, 2, 3))


class TestParts:
    @pytest.fixture
    def vl(self, families: Families) -> tuple[Path, Path]:
        return families(case("Qwen3.5-VL"))

    @staticmethod
    def _names(hf: Path, *starts: str) -> set[str]:
        return {name for name in stored_tensors(hf) if name.startswith(starts)}

    def test_what_was_dropped_is_in_one_only_unless_it_is_left_out(self, vl: tuple[Path, Path], tmp_path: Path) -> None:
        hf, _ = vl
        import_checkpoint(hf, tmp_path / "text", text_only=True)
        report = verify_checkpoints(hf, tmp_path / "text")
        parts = self._names(hf, "model.visual.", "mtp.")
        assert statuses_of(report) == dict.fromkeys(parts, "only_a")
        assert {difference.note for difference in report.differences} == {"the import left it out"}
        report = verify_checkpoints(tmp_path / "text", hf, text_only=True)
        assert report.agrees()
        assert set(report.b.left_out) == parts
        assert report.compared == report.b.tensors == len(stored_tensors(hf)) - len(parts)

    def test_text_only_leaves_out_what_is_carried_and_what_is_converted(self, vl: tuple[Path, Path]) -> None:
        hf, imported = vl
        report = verify_checkpoints(imported, hf, text_only=True)
        assert report.agrees()
        assert {n for n in report.a.left_out if n.startswith("model.visual.")} == self._names(hf, "model.visual.")
        assert any(n.startswith("mtp.layers.0.transformer_layer.") for n in report.a.left_out)

    def test_carried_tensors_are_compared(self, vl: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = vl
        name = sorted(self._names(hf, "model.visual."))[3]
        other = altered(hf, tmp_path / "hf", each(**{name: lambda t: t + 1}))
        assert_differences(verify_checkpoints(imported, other), load_tensors(hf), load_tensors(other))
        text = altered(hf, tmp_path / "no-vision", lambda ts: {n: t for n, t in ts.items() if ".visual." not in n})
        report = verify_checkpoints(imported, text)
        assert statuses_of(report) == dict.fromkeys(self._names(hf, "model.visual."), "only_a")
        assert {difference.note for difference in report.differences} == {"carried in the sidecar"}

    def test_without_a_sidecar_vision_is_in_one_only(self, vl: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = vl
        alone = resave(imported, tmp_path / "alone", lambda tensors: tensors)
        assert statuses_of(verify_checkpoints(alone, hf)) == dict.fromkeys(self._names(hf, "model.visual."), "only_b")

    def test_carried_mtp_is_compared_as_it_is(self, families: Families, tmp_path: Path) -> None:
        hf, _ = families(case("Qwen3-Next"))
        import_checkpoint(hf, tmp_path / "carried", mtp="carry")
        report = verify_checkpoints(hf, tmp_path / "carried")
        assert report.agrees()
        assert (report.compared, report.b.carried) == (len(stored_tensors(hf)), len(self._names(hf, "mtp.")))
        other = altered(hf, tmp_path / "hf", each(**{"mtp.norm.weight": lambda t: t * 2}))
        assert the_only(verify_checkpoints(tmp_path / "carried", other)).name == "mtp.norm.weight"

    def test_mtp_that_only_the_megatron_checkpoint_has(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Qwen3-Next"))
        other = altered(hf, tmp_path / "hf", lambda ts: {n: t for n, t in ts.items() if not n.startswith("mtp.")})
        report = verify_checkpoints(imported, other)
        stored = {name for name in TorchDistReader(imported).tensors if name.startswith("mtp.")}
        assert statuses_of(report) == dict.fromkeys(stored, "only_a")
        assert verify_checkpoints(imported, other, text_only=True).agrees()


class TestMismatches:
    """Between the two kinds."""

    @pytest.fixture
    def pair(self, families: Families) -> tuple[Path, Path]:
        return families(case("Qwen3.5"))

    def test_a_part_that_megatron_lacks(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        lacking = resave(imported, tmp_path / "m", without("layers.0.self_attention.in_proj.weight.key"))
        report = verify_checkpoints(hf, lacking)
        start = "decoder.layers.0.self_attention.in_proj.weight."
        assert statuses_of(report) == {
            "model.layers.0.linear_attn.in_proj_qkv.weight": "only_a",
            f"{start}query": "only_b",
            f"{start}value": "only_b",
        }
        assert all(f"no {start}key" in difference.note for difference in report.differences)

    def test_a_part_that_hugging_face_lacks(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        lacking = altered(hf, tmp_path / "hf", without("1.self_attn.k_proj.weight"))
        difference = the_only(verify_checkpoints(imported, lacking))
        assert (difference.name, difference.status) == ("model.layers.1.self_attn.k_proj.weight", "only_a")
        assert difference.a == TensorInfo(dtype=torch.bfloat16, shape=(24, 36))

    def test_shapes(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        end = "self_attn.o_proj.weight"
        shorter = altered(hf, tmp_path / "hf", each(**{end: lambda t: t[1:].clone()}))
        difference = next(d for d in verify_checkpoints(imported, shorter).differences if not d.name.startswith("mtp"))
        assert difference.status == "shape"
        assert difference.a is not None
        assert difference.b is not None
        assert (difference.a.shape, difference.b.shape) == ((36, 72), (35, 72))
        change = each(**{"layers.1.self_attention.linear_qkv.weight": lambda t: t[1:].clone()})
        wrong = resave(imported, tmp_path / "m", change)
        report = verify_checkpoints(hf, wrong)
        assert statuses_of(report) == {f"model.layers.1.self_attn.{n}_proj.weight": "shape" for n in "qkv"}
        assert all("expected (192, 36)" in difference.note for difference in report.differences)

    def test_names_that_neither_expects(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        more_hf = altered(hf, tmp_path / "hf", lambda tensors: {**tensors, "more": torch.ones(2)})
        more = resave(imported, tmp_path / "m", lambda tensors: {**tensors, "extra": torch.ones(2)})
        assert statuses_of(verify_checkpoints(more_hf, more)) == {"more": "only_a", "extra": "only_b"}

    def test_a_family_that_is_not_known(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        other = altered(hf, tmp_path / "hf", lambda tensors: tensors)
        (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        with pytest.raises(ValueError, match="'gpt2'"):
            verify_checkpoints(other, imported)
        assert verify_checkpoints(other, hf).agrees()  # names are enough there
        (other / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no config\.json in"):
            verify_checkpoints(other, imported)


def _train_and_save(hf: Path, imported: Path, untrained: Path, trained: Path) -> None:
    """Save model and optimizer with tensor-parallel size 2, before and after a step."""
    config = provider.read_hf_config(hf)
    with model_parallel(tensor=2), install_optimizer_repairs():
        overrides: dict[str, Any] = {**provider.cpu_overrides(), "tensor_model_parallel_size": 2}
        model = provider.build_model(
            config, provider.transformer_config(config, **overrides, bf16=True, params_dtype=torch.bfloat16)
        )
        trainer = Trainer(model)
        load_model(model, imported / "release")
        trainer.optimizer.reload_model_params()
        for out in (untrained, trained):
            out.mkdir(exist_ok=True)
            trainer.save(out)
            trainer.step([Batch.random(config.vocab_size)])


@pytest.mark.parametrize("name", ["Qwen3.5, tied", "Llama"])
def test_what_megatron_core_saves_on_two_ranks(
    ranks: Callable[[int], RankPool], families: Families, tmp_path: Path, name: str
) -> None:
    hf, imported = families(case(name))
    untrained, trained = tmp_path / "untrained", tmp_path / "trained"
    ranks(2).run(_train_and_save, hf, imported, untrained, trained)

    for pair in ((hf, untrained), (imported, untrained), (untrained, imported)):
        report = verify_checkpoints(*pair, source=imported)
        assert report.agrees(), report.differences
    assert verify_checkpoints(hf, untrained).agrees()
    sizes = {name: tuple(info.shape) for name, info in TorchDistReader(untrained).tensors.items()}
    rows = sizes["embedding.word_embeddings.weight"][0]
    assert report.a.padding["embedding.word_embeddings.weight"] == rows - 57 > 0
    assert report.a.ignored > len([name for name in sizes if name.startswith("optimizer.")]) > 0
    assert report.a.tensors + report.a.ignored == len(sizes) + len(TorchDistReader(untrained).objects)

    exported = export_checkpoint(trained, tmp_path / "hf", source=imported)
    assert exported.cut_rows
    assert not exported.cut_tokens
    before, after = load_tensors(hf), load_tensors(tmp_path / "hf")
    report = verify_checkpoints(hf, trained, source=imported, vocab_size=57)
    assert len(report.differences) > len(before) / 2
    assert_differences(report, before, after)
    assert verify_checkpoints(tmp_path / "hf", trained, source=imported, vocab_size=57).agrees()
    # The softmax over the padded vocabulary has trained the padding of the head.
    report = verify_checkpoints(tmp_path / "hf", trained, source=imported)
    assert [difference.name for difference in report.differences] == [
        "model.embed_tokens.weight" if "tied" in name else "lm_head.weight"
    ]
    assert f"{rows - 57} rows of" in report.differences[0].note
    assert "they are all equal" in report.differences[0].note
    assert not verify_checkpoints(untrained, trained).agrees()
