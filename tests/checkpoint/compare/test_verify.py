"""Comparison of two checkpoints of one kind: what differs and by how much is computed here from the files."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fp32.checkpoint.compare import verify
from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
from megatron_fp32.checkpoint.convert import export_checkpoint
from megatron_fp32.checkpoint.formats.huggingface import INDEX
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import TensorInfo
from tests.checkpoint.support import (
    A_LOG,
    NORM,
    Changes,
    altered,
    each,
    resave,
    statuses_of,
    stored_tensors,
    the_only,
    without,
)
from tests.conftest import Families
from tests.families import case


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
        statuses = statuses_of(verify_checkpoints(hf, tmp_path / "shards"))
        mtp = {name for name in stored_tensors(hf) if name.startswith("mtp.")}  # transformers drops them
        assert {name for name, status in statuses.items() if status == "only_a"} == mtp
        # and keeps no A_log in fp32
        assert set(statuses) - mtp == {
            n for n in stored_tensors(hf) if n.endswith(("A_log", "linear_attn.norm.weight"))
        }

    def test_missing_extra_and_misshapen_tensors_are_named(self, hf: Path, tmp_path: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**without("lm_head.weight")(tensors), "more": torch.ones(3), NORM: tensors[NORM][1:].clone()}

        report = verify_checkpoints(hf, altered(hf, tmp_path / "hf", change))
        assert statuses_of(report) == {"lm_head.weight": "only_a", "more": "only_b", NORM: "shape"}
        lost, more, shape = report.differences
        assert (lost.a, lost.b) == (TensorInfo(dtype=torch.bfloat16, shape=(57, 36)), None)
        assert (more.a, more.b) == (None, TensorInfo(dtype=torch.float32, shape=(3,)))
        assert shape.a is not None
        assert shape.b is not None
        assert (shape.a.shape, shape.b.shape, shape.values) == ((7,), (6,), None)
        assert report.compared == report.equal == len(stored_tensors(hf)) - 2
        assert not report.agrees(values_only=True)

    def test_another_dtype_with_the_same_values_is_told_from_other_values(self, hf: Path, tmp_path: Path) -> None:
        wide = altered(hf, tmp_path / "wide", lambda tensors: {n: t.float() for n, t in tensors.items()})
        report = verify_checkpoints(hf, wide)
        assert set(statuses_of(report).values()) == {"dtype"}
        assert {n for n, (dtype, *_) in stored_tensors(hf).items() if dtype == "BF16"} == set(statuses_of(report))
        assert (report.agrees(), report.agrees(values_only=True)) == (False, True)

        narrow = altered(hf, tmp_path / "narrow", lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
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

        a = altered(hf, tmp_path / "a", change)
        b = altered(a, tmp_path / "b", each(**{NORM: torch.negative}))
        report = verify_checkpoints(hf, a)
        values = next(d.values for d in report.differences if d.name == A_LOG)
        assert values is not None
        assert (values.count, values.first, values.absolute, values.nan) == (1, (1,), None, (0, 1))
        assert verify_checkpoints(a, a).agrees()
        assert the_only(verify_checkpoints(a, b)).name == NORM

    def test_large_stacks_are_compared_one_element_at_a_time(
        self, families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hf, imported = families(case("Qwen3.5-MoE"))
        other = altered(hf, tmp_path / "hf", each(**{"1.mlp.experts.down_proj": lambda t: t * 1.5}))
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
        other = altered(hf, tmp_path / "hf", each(**{A_LOG: lambda t: t.to(torch.float8_e4m3fn)}))
        assert "without their scales" in the_only(verify_checkpoints(hf, other)).note
        assert verify_checkpoints(other, other).agrees()

    def test_a_source_means_nothing_here(self, families: Families) -> None:
        hf, imported = families(case("Qwen3.5"))
        with pytest.raises(ValueError, match=r"source must be left out, because .* a Megatron checkpoint"):
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

            change = each(**{"decoder.layers.1.mlp.linear_fc2.weight": _add_at_3, "linear_proj.weight": _add_at_3})
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
        statuses = statuses_of(verify_checkpoints(imported, fewer))
        assert len(statuses) == 6
        assert all(n.startswith("decoder.layers.2.") and s == "only_a" for n, s in statuses.items())
        assert set(statuses_of(verify_checkpoints(fewer, hf)).values()) == {"shape"}

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
            resave(imported, tmp_path / f"{rows}", pad(rows, value)) for rows, value in ((3, -0.0), (7, 0.0))
        )
        report = verify_checkpoints(three, seven)
        assert set(statuses_of(report).values()) == {"shape"}
        assert all("pass source=DIR" in difference.note for difference in report.differences)
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


class TestKinds:
    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"is not a checkpoint: it holds neither .metadata nor .* neither model\.safetensors"
        ):
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
        with pytest.raises(CheckpointError, match=r"source\.json is not a JSON object"):
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


def test_a_checkpoint_of_one_file_equals_itself_beside_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"x": torch.arange(5.0)}, tmp_path / name / "model.safetensors")
    report = verify_checkpoints(tmp_path / "a", tmp_path / "b")
    assert (report.agrees(), report.compared, report.nbytes) == (True, 1, 20)
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["a"]["kind"] == "huggingface"
