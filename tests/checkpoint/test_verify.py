"""Comparison of checkpoints: what differs and by how much is computed here from the files, without the package."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fp32.checkpoint import verify
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.findings import TensorDifference, VerifyReport
from megatron_fp32.checkpoint.huggingface import INDEX, CheckpointError, TensorInfo
from megatron_fp32.checkpoint.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.verify import verify_checkpoints
from megatron_fp32.models import provider
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.testing.training import Batch, Trainer, load_model
from tests.checkpoint.conftest import Families
from tests.checkpoint.support import resave, rewrite, stored_tensors
from tests.families import CASES, Case, case

Changes = Callable[[dict[str, Tensor]], dict[str, Tensor]]

NORM = "model.layers.0.linear_attn.norm.weight"
A_LOG = "model.layers.0.linear_attn.A_log"


def _changed_hf(hf: Path, out: Path, change: Changes) -> Path:
    shutil.copytree(hf, out)
    return rewrite(out, change)


def _with(**changes: Callable[[Tensor], Tensor]) -> Changes:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: next((f for end, f in changes.items() if name.endswith(end)), lambda t: t)(tensor)
            for name, tensor in tensors.items()
        }

    return change


def _without(*ends: str) -> Changes:
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(ends)}


def _statuses(report: VerifyReport) -> dict[str, str]:
    return {difference.name: difference.status for difference in report.differences}


def _only(report: VerifyReport) -> TensorDifference:
    (difference,) = report.differences
    return difference


def _load(directory: Path) -> dict[str, Tensor]:
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


def _assert_differences(report: VerifyReport, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The report says what float64 says of two checkpoints with the same names, shapes and dtypes."""
    assert a.keys() == b.keys()
    expected = {}
    for name, first in a.items():
        x, y = first.double(), b[name].double()
        if not torch.equal(x, y):
            sizes = (x - y).abs()
            relative = (sizes / torch.maximum(x.abs(), y.abs())).nan_to_num(0)
            expected[name] = (int((x != y).sum()), float(sizes.max()), float(relative.max()))
    found = {}
    for difference in report.differences:
        values = difference.values
        assert difference.status == "values"
        assert values is not None
        assert values.absolute is not None
        assert values.relative is not None
        found[difference.name] = (values.count, values.absolute.size, values.relative.size)
        pair = a[difference.name][values.absolute.index], b[difference.name][values.absolute.index]
        assert (values.absolute.a, values.absolute.b) == (float(pair[0]), float(pair[1]))
        assert abs(values.absolute.a - values.absolute.b) == values.absolute.size
    assert found == {n: (count, size, pytest.approx(relative)) for n, (count, size, relative) in expected.items()}
    assert (report.compared, report.equal) == (len(a), len(a) - len(expected))


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

        other = _changed_hf(hf, tmp_path / "hf", flip)
        before, after = _load(hf), _load(other)
        reports = [verify_checkpoints(imported, other), verify_checkpoints(hf, other)]
        for report in reports:
            _assert_differences(report, before, after)
            assert {d.values.count for d in report.differences if d.values} == {1}
            assert (len(report.differences), report.equal) == (len(before), 0)
        _assert_differences(verify_checkpoints(other, imported), after, before)

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
        _assert_differences(report, _load(hf), _load(tmp_path / "hf"))
        assert verify_checkpoints(trained, tmp_path / "hf", source=imported).agrees()


class TestHuggingFace:
    @pytest.fixture
    def hf(self, families: Families) -> Path:
        return families(case("Qwen3.5"))[0]

    def test_shards_do_not_matter(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Qwen3.5-VL-MoE"))
        export_checkpoint(imported, tmp_path / "shards", max_shard_bytes=30_000)
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
        for pair in ((hf, tmp_path / "shards"), (tmp_path / "shards", imported)):
            assert verify_checkpoints(*pair).agrees()

    def test_shards_of_transformers_do_not_matter(self, hf: Path, tmp_path: Path) -> None:
        model = case("Qwen3.5").load(hf, torch.bfloat16)
        model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")  # type: ignore[operator]
        assert (tmp_path / "shards" / INDEX).is_file()
        statuses = _statuses(verify_checkpoints(hf, tmp_path / "shards"))
        mtp = {name for name in stored_tensors(hf) if name.startswith("mtp.")}  # transformers drops them
        assert {name for name, status in statuses.items() if status == "only_a"} == mtp
        # and keeps no A_log in fp32
        assert set(statuses) - mtp == {
            n for n in stored_tensors(hf) if n.endswith(("A_log", "linear_attn.norm.weight"))
        }

    def test_missing_extra_and_misshapen_tensors_are_named(self, hf: Path, tmp_path: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**_without("lm_head.weight")(tensors), "more": torch.ones(3), NORM: tensors[NORM][1:].clone()}

        report = verify_checkpoints(hf, _changed_hf(hf, tmp_path / "hf", change))
        assert _statuses(report) == {"lm_head.weight": "only_a", "more": "only_b", NORM: "shape"}
        lost, more, shape = report.differences
        assert (lost.a, lost.b) == (TensorInfo(dtype=torch.bfloat16, shape=(57, 36)), None)
        assert (more.a, more.b) == (None, TensorInfo(dtype=torch.float32, shape=(3,)))
        assert shape.a is not None
        assert shape.b is not None
        assert (shape.a.shape, shape.b.shape, shape.values) == ((7,), (6,), None)
        assert report.compared == report.equal == len(stored_tensors(hf)) - 2
        assert not report.agrees(values_only=True)

    def test_another_dtype_with_the_same_values_is_told_from_other_values(self, hf: Path, tmp_path: Path) -> None:
        wide = _changed_hf(hf, tmp_path / "wide", lambda tensors: {n: t.float() for n, t in tensors.items()})
        report = verify_checkpoints(hf, wide)
        assert set(_statuses(report).values()) == {"dtype"}
        assert {n for n, (dtype, *_) in stored_tensors(hf).items() if dtype == "BF16"} == set(_statuses(report))
        assert (report.agrees(), report.agrees(values_only=True)) == (False, True)

        narrow = _changed_hf(hf, tmp_path / "narrow", lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
        report = verify_checkpoints(hf, narrow)
        assert not report.agrees(values_only=True)
        a_log = next(d for d in report.differences if d.name == A_LOG)
        before = load_file(hf / "model.safetensors")[A_LOG]
        assert a_log.values is not None
        assert a_log.values.absolute is not None
        assert a_log.status == "values"
        assert a_log.values.absolute.size == float((before.double() - before.bfloat16().double()).abs().max())

    def test_nan_and_the_sign_of_zero_are_differences(self, hf: Path, tmp_path: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            tensors[A_LOG][1] = math.nan
            tensors[NORM][2] = 0.0
            return tensors

        a = _changed_hf(hf, tmp_path / "a", change)
        b = _changed_hf(a, tmp_path / "b", _with(**{NORM: torch.negative}))
        report = verify_checkpoints(hf, a)
        values = next(d.values for d in report.differences if d.name == A_LOG)
        assert values is not None
        assert (values.count, values.first, values.absolute, values.nan) == (1, (1,), None, (0, 1))
        assert verify_checkpoints(a, a).agrees()
        assert _only(verify_checkpoints(a, b)).name == NORM

    def test_large_stacks_are_compared_one_element_at_a_time(
        self, families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hf, imported = families(case("Qwen3.5-MoE"))
        other = _changed_hf(hf, tmp_path / "hf", _with(**{"1.mlp.experts.down_proj": lambda t: t * 1.5}))
        whole = verify_checkpoints(hf, other)
        assert len(whole.differences) == 1
        of_megatron = verify_checkpoints(imported, imported)
        monkeypatch.setattr(verify, "_WHOLE_BYTES", 1)
        assert verify_checkpoints(imported, imported) == of_megatron
        steps: list[tuple[str, int, int]] = []
        assert verify_checkpoints(hf, other, progress=lambda *step: steps.append(step)) == whole
        assert len(steps) > whole.compared

    def test_progress_ends_at_the_total(self, families: Families) -> None:
        for pair in itertools.permutations(families(case("Qwen3.5-VL-MoE"))):
            steps: list[tuple[str, int, int]] = []
            report = verify_checkpoints(*pair, progress=lambda *step, steps=steps: steps.append(step))
            assert {(what, total) for what, _, total in steps} == {("compare", report.nbytes)}
            assert sum(size for _, size, _ in steps) == report.nbytes

    def test_float8_beside_other_dtypes_is_noted(self, hf: Path, tmp_path: Path) -> None:
        other = _changed_hf(hf, tmp_path / "hf", _with(**{A_LOG: lambda t: t.to(torch.float8_e4m3fn)}))
        assert "without their scales" in _only(verify_checkpoints(hf, other)).note
        assert verify_checkpoints(other, other).agrees()

    def test_a_source_means_nothing_here(self, families: Families) -> None:
        hf, imported = families(case("Qwen3.5"))
        with pytest.raises(ValueError, match="a source is for Megatron checkpoints"):
            verify_checkpoints(hf, hf, source=imported)


class TestMegatron:
    def test_stacked_layers_equal_separate_ones(self, families: Families, tmp_path: Path) -> None:
        for name in ("Llama", "Qwen3-MoE"):
            hf, imported = families(case(name))

            def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                changed = {}
                for key, tensor in tensors.items():
                    start, middle, end = key.partition("decoder.layers.")
                    parts = tensor.unbind() if middle else [tensor]
                    changed |= {f"{start}{middle}{i}.{end}" if middle else key: part for i, part in enumerate(parts)}
                return changed

            layers = resave(imported, tmp_path / f"{name}, layers", separate)
            for pair in ((imported, layers), (layers, imported), (hf, layers)):
                report = verify_checkpoints(*pair)
                assert report.agrees(), report.differences
            assert report.compared == len(stored_tensors(hf))

            change = _with(**{"decoder.layers.1.mlp.linear_fc2.weight": _add_at_3, "linear_proj.weight": _add_at_3})
            other = resave(layers, tmp_path / f"{name}, changed", change)
            found = {d.name: d.values and d.values.count for d in verify_checkpoints(imported, other).differences}
            expected = {f"decoder.layers.{i}.self_attention.linear_proj.weight": 1 for i in range(3)}
            assert found == {**expected, **({"decoder.layers.1.mlp.linear_fc2.weight": 1} if name == "Llama" else {})}

    def test_another_number_of_layers(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Llama"))
        fewer = resave(
            imported,
            tmp_path / "fewer",
            lambda tensors: {n: t[:2].clone() if n.startswith("decoder.layers.") else t for n, t in tensors.items()},
        )
        statuses = _statuses(verify_checkpoints(imported, fewer))
        assert len(statuses) == 6
        assert all(n.startswith("decoder.layers.2.") and s == "only_a" for n, s in statuses.items())
        assert set(_statuses(verify_checkpoints(fewer, hf)).values()) == {"shape"}

    def test_a_padded_vocabulary_needs_a_source(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Llama"))

        def pad(rows: int, value: float) -> Changes:
            def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                    padding = tensors[name].new_full((rows, tensors[name].shape[1]), value)
                    tensors[name] = torch.cat([tensors[name], padding])
                return tensors

            return change

        three, seven = (
            resave(imported, tmp_path / f"{rows}", pad(rows, value)) for rows, value in ((3, 0.5), (7, 0.0))
        )
        report = verify_checkpoints(three, seven)
        assert set(_statuses(report).values()) == {"shape"}
        assert all("name a source" in difference.note for difference in report.differences)
        report = verify_checkpoints(three, seven, source=imported)
        assert report.agrees()
        assert set(report.a.padding.values()) == {3}
        assert set(report.b.padding.values()) == {7}
        assert verify_checkpoints(imported, seven).agrees()  # the import's own sidecar knows
        report = verify_checkpoints(seven, hf)
        assert report.agrees()
        assert set(report.a.padding.values()) == {7}


def _add_at_3(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] += 1
    return tensor


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
        other = _changed_hf(hf, tmp_path / "hf", _with(**{NORM: lambda t: torch.where(same, twin, norm)}))
        difference = _only(verify_checkpoints(other, imported))
        assert difference.values is not None
        assert (difference.name, difference.values.count) == (NORM, int(same.sum()))
        alone = resave(imported, tmp_path / "alone", lambda tensors: tensors)
        assert verify_checkpoints(other, alone).agrees()  # an import of it would give the same bytes

    def test_fp32_that_the_sources_dtype_holds_leaves_as_that(self, bf16: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = bf16
        wide = resave(imported, tmp_path / "wide", _with(A_log=Tensor.float))
        for source in (None, imported):
            assert verify_checkpoints(wide, hf, source=source).agrees()
        trained = resave(imported, tmp_path / "trained", _with(A_log=lambda t: t.float() + 2**-15))
        report = verify_checkpoints(hf, trained, source=imported)
        assert _statuses(report) == {n: "values" for n in stored_tensors(hf) if n.endswith("A_log")}
        for difference in report.differences:
            assert difference.a is not None
            assert difference.b is not None
            assert (difference.a.dtype, difference.b.dtype) == (torch.bfloat16, torch.float32)

    def test_what_a_stock_model_rounded_is_named_with_its_dtype(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Qwen3.5"))
        rounded = resave(imported, tmp_path / "rounded", _with(A_log=Tensor.bfloat16))
        report = verify_checkpoints(rounded, hf, source=imported)
        assert _statuses(report) == {n: "values" for n in stored_tensors(hf) if n.endswith("A_log")}
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

        trained = resave(tmp_path / "megatron", tmp_path / "trained", _with(**{name: train}))
        difference = _only(verify_checkpoints(trained, hf, source=tmp_path / "megatron"))
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
        assert _statuses(report) == dict.fromkeys(parts, "only_a")
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
        other = _changed_hf(hf, tmp_path / "hf", _with(**{name: lambda t: t + 1}))
        _assert_differences(verify_checkpoints(imported, other), _load(hf), _load(other))
        text = _changed_hf(hf, tmp_path / "no-vision", lambda ts: {n: t for n, t in ts.items() if ".visual." not in n})
        report = verify_checkpoints(imported, text)
        assert _statuses(report) == dict.fromkeys(self._names(hf, "model.visual."), "only_a")
        assert {difference.note for difference in report.differences} == {"carried in the sidecar"}

    def test_without_a_sidecar_vision_is_in_one_only(self, vl: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = vl
        alone = resave(imported, tmp_path / "alone", lambda tensors: tensors)
        assert _statuses(verify_checkpoints(alone, hf)) == dict.fromkeys(self._names(hf, "model.visual."), "only_b")

    def test_carried_mtp_is_compared_as_it_is(self, families: Families, tmp_path: Path) -> None:
        hf, _ = families(case("Qwen3-Next"))
        import_checkpoint(hf, tmp_path / "carried", mtp="carry")
        report = verify_checkpoints(hf, tmp_path / "carried")
        assert report.agrees()
        assert (report.compared, report.b.carried) == (len(stored_tensors(hf)), len(self._names(hf, "mtp.")))
        other = _changed_hf(hf, tmp_path / "hf", _with(**{"mtp.norm.weight": lambda t: t * 2}))
        assert _only(verify_checkpoints(tmp_path / "carried", other)).name == "mtp.norm.weight"

    def test_mtp_that_only_the_megatron_checkpoint_has(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Qwen3-Next"))
        other = _changed_hf(hf, tmp_path / "hf", lambda ts: {n: t for n, t in ts.items() if not n.startswith("mtp.")})
        report = verify_checkpoints(imported, other)
        stored = {name for name in TorchDistReader(imported).tensors if name.startswith("mtp.")}
        assert _statuses(report) == dict.fromkeys(stored, "only_a")
        assert verify_checkpoints(imported, other, text_only=True).agrees()


class TestMismatches:
    """Between the two kinds."""

    @pytest.fixture
    def pair(self, families: Families) -> tuple[Path, Path]:
        return families(case("Qwen3.5"))

    def test_a_part_that_megatron_lacks(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        lacking = resave(imported, tmp_path / "m", _without("layers.0.self_attention.in_proj.weight.key"))
        report = verify_checkpoints(hf, lacking)
        start = "decoder.layers.0.self_attention.in_proj.weight."
        assert _statuses(report) == {
            "model.layers.0.linear_attn.in_proj_qkv.weight": "only_a",
            f"{start}query": "only_b",
            f"{start}value": "only_b",
        }
        assert all(f"no {start}key" in difference.note for difference in report.differences)

    def test_a_part_that_hugging_face_lacks(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        lacking = _changed_hf(hf, tmp_path / "hf", _without("1.self_attn.k_proj.weight"))
        difference = _only(verify_checkpoints(imported, lacking))
        assert (difference.name, difference.status) == ("model.layers.1.self_attn.k_proj.weight", "only_a")
        assert difference.a == TensorInfo(dtype=torch.bfloat16, shape=(24, 36))

    def test_shapes(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        end = "self_attn.o_proj.weight"
        shorter = _changed_hf(hf, tmp_path / "hf", _with(**{end: lambda t: t[1:].clone()}))
        difference = next(d for d in verify_checkpoints(imported, shorter).differences if not d.name.startswith("mtp"))
        assert difference.status == "shape"
        assert difference.a is not None
        assert difference.b is not None
        assert (difference.a.shape, difference.b.shape) == ((36, 72), (35, 72))
        change = _with(**{"layers.1.self_attention.linear_qkv.weight": lambda t: t[1:].clone()})
        wrong = resave(imported, tmp_path / "m", change)
        report = verify_checkpoints(hf, wrong)
        assert _statuses(report) == {f"model.layers.1.self_attn.{n}_proj.weight": "shape" for n in "qkv"}
        assert all("expected (192, 36)" in difference.note for difference in report.differences)

    def test_names_that_neither_expects(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        more_hf = _changed_hf(hf, tmp_path / "hf", lambda tensors: {**tensors, "more": torch.ones(2)})
        more = resave(imported, tmp_path / "m", lambda tensors: {**tensors, "extra": torch.ones(2)})
        assert _statuses(verify_checkpoints(more_hf, more)) == {"more": "only_a", "extra": "only_b"}

    def test_a_family_that_is_not_known(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        hf, imported = pair
        other = _changed_hf(hf, tmp_path / "hf", lambda tensors: tensors)
        (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        with pytest.raises(ValueError, match="'gpt2'"):
            verify_checkpoints(other, imported)
        assert verify_checkpoints(other, hf).agrees()  # names are enough there
        (other / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
            verify_checkpoints(other, imported)


class TestKinds:
    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"holds no checkpoint: expected either model\.safetensors"):
            verify_checkpoints(tmp_path, tmp_path)

    def test_both_kinds(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Llama"))
        shutil.copytree(imported, tmp_path / "both")
        shutil.copy(hf / "model.safetensors", tmp_path / "both")
        with pytest.raises(CheckpointError, match="both kinds of checkpoint"):
            verify_checkpoints(tmp_path / "both", hf)

    def test_a_damaged_sidecar_is_no_missing_one(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Qwen3.5"))
        shutil.copytree(imported, tmp_path / "m")
        (tmp_path / "m" / "hf_source" / "source.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"source\.json is damaged"):
            verify_checkpoints(hf, tmp_path / "m")
        (tmp_path / "m" / "hf_source" / "source.json").unlink()
        with pytest.raises(CheckpointError, match="there is no hf_source"):
            verify_checkpoints(hf, tmp_path / "m")

    def test_damaged_data(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Llama"))
        shutil.copytree(imported, tmp_path / "m")
        for path in (tmp_path / "m").rglob("*.distcp"):
            path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(CheckpointError, match="is damaged"):
            verify_checkpoints(hf, tmp_path / "m")


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

    export_checkpoint(trained, tmp_path / "hf", source=imported)
    before, after = _load(hf), _load(tmp_path / "hf")
    report = verify_checkpoints(hf, trained, source=imported)
    assert len(report.differences) > len(before) / 2
    _assert_differences(report, before, after)
    assert verify_checkpoints(tmp_path / "hf", trained, source=imported).agrees()
    assert not verify_checkpoints(untrained, trained).agrees()


def test_a_checkpoint_of_one_file_equals_itself_beside_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"x": torch.arange(5.0)}, tmp_path / name / "model.safetensors")
    report = verify_checkpoints(tmp_path / "a", tmp_path / "b")
    assert (report.agrees(), report.compared, report.nbytes) == (True, 1, 20)
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["a"]["kind"] == "huggingface"
