"""Rows of the vocabulary that a trainer added: padding is cut off, trained rows are reported or exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
from megatron_fp32.checkpoint.convert import export_checkpoint
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.fp8 import named_scheme
from megatron_fp32.cli import main
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.vocabulary import CutRows
from tests.checkpoint.support import resave, statuses_of, stored_tensors, the_only
from tests.conftest import Families
from tests.families import case, config_json

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
SIZE = 57
"""Of the vocabulary of every case."""
ABOVE = range(57, 64)

Make = Callable[..., Path]


@pytest.fixture
def make(families: Families, tmp_path: Path) -> Make:
    """`make(name, {tensor: {row: value}})`: what an import made of a case, with 7 more rows, all others zero."""
    count = 0

    def of(name: str, values: dict[str, dict[int, float]]) -> Path:
        nonlocal count
        count += 1

        def pad(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for padded in tensors.keys() & {EMBEDDING, HEAD}:
                rows = tensors[padded].new_zeros(7, tensors[padded].shape[1])
                for row, value in values.get(padded, {}).items():
                    rows[row - SIZE, 3] = value
                tensors[padded] = torch.cat([tensors[padded], rows])
            return tensors

        return resave(families(case(name))[1], tmp_path / f"padded{count}", pad)

    return of


def _run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


class TestExport:
    def test_zeros_are_padding(self, make: Make, families: Families, tmp_path: Path) -> None:
        hf, source = families(case("Qwen3"))
        report = export_checkpoint(make("Qwen3", {EMBEDDING: {60: -0.0}}), tmp_path / "hf", source=source)
        assert report.cut_rows == {}
        assert not report.cut_tokens
        assert stored_tensors(tmp_path / "hf") == stored_tensors(hf)

    @pytest.mark.parametrize("value", [1.0, -1e-30, torch.nan, torch.inf])
    def test_other_rows_are_counted(self, value: float, make: Make, families: Families, tmp_path: Path) -> None:
        hf, source = families(case("Qwen3"))
        megatron = make("Qwen3", {EMBEDDING: {57: value, 60: value}, HEAD: {63: value}})
        report = export_checkpoint(megatron, tmp_path / "hf", source=source)
        assert report.cut_rows == {
            EMBEDDING: CutRows(rows=2, end=61, alike=False), HEAD: CutRows(rows=1, end=64, alike=False)
        }  # fmt: skip
        assert report.cut_tokens
        assert stored_tensors(tmp_path / "hf") == stored_tensors(hf)

    @pytest.mark.parametrize(
        ("name", "values", "is_padding"),
        [
            ("Qwen3", {HEAD: dict.fromkeys(ABOVE, 0.25)}, True),
            ("Qwen3", {HEAD: {**dict.fromkeys(ABOVE, 0.25), 60: 0.5}}, False),
            ("Qwen3", {HEAD: {row: 0.25 for row in ABOVE if row != 63}}, False),
            ("Qwen3", {HEAD: dict.fromkeys(ABOVE, torch.nan)}, False),
            ("Qwen3", {EMBEDDING: dict.fromkeys(ABOVE, 0.25)}, False),
            ("Qwen3", {EMBEDDING: dict.fromkeys(ABOVE, 0.25), HEAD: dict.fromkeys(ABOVE, 0.25)}, False),
            ("Qwen3, tied", {EMBEDDING: dict.fromkeys(ABOVE, 0.25)}, True),
            ("Qwen3, tied", {EMBEDDING: {**dict.fromkeys(ABOVE, 0.25), 60: 0.5}}, False),
        ],
    )
    def test_padding_that_a_softmax_trained(
        self, name: str, values: Any, is_padding: bool, make: Make, families: Families, tmp_path: Path
    ) -> None:
        """It is alike in every row, of the head or of a tied embedding, and still listed."""
        hf, source = families(case(name))
        megatron = make(name, values)
        result = _run("export", megatron, tmp_path / "hf", "--source", source)
        assert result.exit_code == (0 if is_padding else 1)
        assert ("padding that a softmax trained" if is_padding else "may be tokens") in result.stdout
        assert all(f"rows of {padded} above the vocabulary" in result.stdout for padded in values)
        assert ("they are all equal" in verify_checkpoints(hf, megatron, source=source).differences[0].note) == all(
            len(set(rows.values())) == 1 and len(rows) == 7 and 0.25 in rows.values() for rows in values.values()
        )

    def test_one_row_is_not_taken_for_padding(self, families: Families, tmp_path: Path) -> None:
        _, source = families(case("Qwen3"))

        def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**tensors, HEAD: torch.cat([tensors[HEAD], torch.ones(1, 36).bfloat16()])}

        megatron = resave(source, tmp_path / "one", add)
        assert export_checkpoint(megatron, tmp_path / "hf", source=source).cut_tokens

    @pytest.mark.parametrize("name", ["Qwen3", "Qwen3, tied", "Qwen3.5", "Qwen3.5-VL"])
    def test_a_larger_vocabulary_has_them(self, name: str, make: Make, families: Families, tmp_path: Path) -> None:
        _, source = families(case(name))
        megatron = make(name, {EMBEDDING: {58: 2.0}, HEAD: {59: 3.0}})
        report = export_checkpoint(megatron, tmp_path / "hf", source=source, vocab_size=60)
        assert report.cut_rows == {}
        exported, stored = load_file(tmp_path / "hf" / "model.safetensors"), TorchDistReader(megatron)
        (embedding,) = (tensor for key, tensor in exported.items() if key.endswith("embed_tokens.weight"))
        assert torch.equal(embedding, stored.read(EMBEDDING)[:60])
        if HEAD in stored.tensors:
            assert torch.equal(exported["lm_head.weight"], stored.read(HEAD)[:60])
        config = AutoConfig.from_pretrained(tmp_path / "hf")
        assert config.get_text_config().vocab_size == 60
        before, after = config_json(source / "hf_source" / "assets"), config_json(tmp_path / "hf")
        for part in (before, before.get("text_config", {}), after, after.get("text_config", {})):
            part.pop("vocab_size", None)
        assert after == before
        assert verify_checkpoints(tmp_path / "hf", megatron, source=source).agrees()

    def test_transformers_loads_the_larger_vocabulary(self, make: Make, families: Families, tmp_path: Path) -> None:
        _, source = families(case("Qwen3"))
        megatron = make("Qwen3", {EMBEDDING: {58: 2.0}})
        export_checkpoint(megatron, tmp_path / "hf", source=source, vocab_size=64)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        assert model.get_input_embeddings().weight[58, 3] == 2.0

    def test_rows_above_a_chosen_size_are_still_reported(self, make: Make, families: Families, tmp_path: Path) -> None:
        megatron = make("Qwen3", {EMBEDDING: {58: 2.0}, HEAD: {58: 2.0, 63: 1.0}})
        source = families(case("Qwen3"))[1]
        report = export_checkpoint(megatron, tmp_path / "hf", source=source, vocab_size=60)
        assert report.cut_rows == {HEAD: CutRows(rows=1, end=64, alike=False)}

    def test_float8_on_the_way(self, make: Make, families: Families, tmp_path: Path) -> None:
        _, source = families(case("Qwen3"))
        options = {"source": source, "vocab_size": 64, "fp8": named_scheme("blockwise")}
        export_checkpoint(make("Qwen3", {EMBEDDING: {58: 2.0}}), tmp_path / "hf", **options)
        config = config_json(tmp_path / "hf")
        assert config["vocab_size"] == 64
        assert config["quantization_config"]["quant_method"] == "fp8"
        assert stored_tensors(tmp_path / "hf")["lm_head.weight"][1] == [64, 36]

    @pytest.mark.parametrize(
        ("vocab_size", "message"),
        [
            (56, "must be at least 57, the vocab_size in the source's config.*got 56"),
            (65, "vocab_size=65 must be at most 64"),
        ],
    )
    def test_a_size_that_cannot_be_is_refused(
        self, vocab_size: int, message: str, make: Make, families: Families, tmp_path: Path
    ) -> None:
        _, source = families(case("Qwen3"))
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(make("Qwen3", {}), tmp_path / "hf", source=source, vocab_size=vocab_size)
        assert not (tmp_path / "hf").exists()

    @pytest.mark.parametrize("vocab_size", [0, -1, 57.0, True, "57"])
    def test_what_is_no_size_is_refused(self, vocab_size: Any, families: Families, tmp_path: Path) -> None:
        hf, megatron = families(case("Qwen3"))
        with pytest.raises(ValueError, match="vocab_size must be None or a whole number"):
            export_checkpoint(megatron, tmp_path / "hf", vocab_size=vocab_size)
        with pytest.raises(ValueError, match="vocab_size must be None or a whole number"):
            verify_checkpoints(hf, megatron, vocab_size=vocab_size)

    def test_the_command_names_them_and_is_no_success(self, make: Make, families: Families, tmp_path: Path) -> None:
        _, source = families(case("Qwen3"))
        megatron = make("Qwen3", {HEAD: {58: 1.0, 61: 1.0}})
        result = _run("export", megatron, tmp_path / "a", "--source", source)
        assert result.exit_code == 1
        text = " ".join(result.stdout.split())
        assert f"not exported: 2 rows of {HEAD} above the vocabulary" in text
        assert "They may be tokens that were added" in text
        assert "--vocab-size 62 exports them" in text
        result = _run("export", megatron, tmp_path / "b", "--source", source, "--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout)["cut_rows"] == {HEAD: {"rows": 2, "end": 62, "alike": False}}
        assert _run("export", megatron, tmp_path / "c", "--source", source, "--vocab-size", 57).exit_code == 0
        assert _run("export", megatron, tmp_path / "d", "--source", source, "--vocab-size", 62).exit_code == 0
        assert _run("export", make("Qwen3", {}), tmp_path / "e", "--source", source).exit_code == 0


class TestVerify:
    def test_trained_rows_are_a_difference_from_hugging_face(self, make: Make, families: Families) -> None:
        hf, source = families(case("Qwen3"))
        megatron = make("Qwen3", {EMBEDDING: {57: 1.0, 60: torch.nan}})
        for pair in ((hf, megatron), (megatron, hf)):
            report = verify_checkpoints(*pair, source=source)
            difference = the_only(report)
            assert (difference.name, difference.status) == ("model.embed_tokens.weight", "shape")
            trained = f"2 rows of {EMBEDDING} above the vocabulary of 57 are not zero"
            assert difference.note == f"{trained}. Pass vocab_size=57 to compare without them"
            assert difference.values is not None
            assert difference.values.count == 0
            assert report.equal == report.compared == len(stored_tensors(hf)) - 1
            side = report.a if pair[0] == megatron else report.b
            assert side.padding == {HEAD: 7}
        assert not verify_checkpoints(hf, megatron).agrees()  # without a sidecar

    def test_rows_that_both_have_are_compared_beside_them(self, make: Make, families: Families, tmp_path: Path) -> None:
        hf, source = families(case("Qwen3"))

        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            tensors[EMBEDDING][5, 5] += 1
            return tensors

        megatron = resave(make("Qwen3", {EMBEDDING: {57: 1.0}}), tmp_path / "changed", change)
        difference = the_only(verify_checkpoints(hf, megatron, source=source))
        assert difference.status == "shape"
        assert difference.values is not None
        assert (difference.values.count, difference.values.first) == (1, (5, 5))

    def test_two_of_megatron(self, make: Make, families: Families) -> None:
        source = families(case("Qwen3"))[1]
        padded, trained = make("Qwen3", {}), make("Qwen3", {EMBEDDING: {58: 1.0}})
        other = make("Qwen3", {EMBEDDING: {58: 1.5}})
        assert verify_checkpoints(source, padded).agrees()
        assert statuses_of(verify_checkpoints(source, trained)) == {EMBEDDING: "shape"}
        assert "above the vocabulary of 57" in the_only(verify_checkpoints(trained, source)).note
        assert statuses_of(verify_checkpoints(padded, trained, source=source)) == {EMBEDDING: "values"}
        assert statuses_of(verify_checkpoints(trained, other, source=source)) == {EMBEDDING: "values"}
        report = verify_checkpoints(trained, trained, source=source)
        assert report.agrees()
        assert report.a.padding == {EMBEDDING: 5, HEAD: 7}

    def test_rows_from_a_size_on_that_is_given_are_padding(self, make: Make, families: Families) -> None:
        hf, source = families(case("Qwen3"))
        trained, other = make("Qwen3", {HEAD: {58: 1.0}}), make("Qwen3", {HEAD: {58: 2.0}})
        for pair in ((hf, trained), (trained, hf), (trained, other), (source, trained)):
            assert verify_checkpoints(*pair, vocab_size=57).agrees()
            assert verify_checkpoints(*pair, vocab_size=58).agrees()
            assert not verify_checkpoints(*pair, vocab_size=59, source=source).agrees()

    def test_a_size_for_two_of_hugging_face_is_refused(self, families: Families) -> None:
        hf, _ = families(case("Qwen3"))
        with pytest.raises(ValueError, match=r"vocab_size must be left out, because .* a Megatron checkpoint"):
            verify_checkpoints(hf, hf, vocab_size=57)

    def test_the_command(self, make: Make, families: Families) -> None:
        hf, source = families(case("Qwen3"))
        result = _run("verify", hf, make("Qwen3", {HEAD: {58: 1.0}}), "--source", source)
        assert result.exit_code == 1
        assert f"1 rows of {HEAD} above the vocabulary of 57 are not zero" in result.stdout
        assert _run("verify", hf, make("Qwen3", {HEAD: {58: 1.0}}), "--vocab-size", 57).exit_code == 0
