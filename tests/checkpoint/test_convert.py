"""Hugging Face -> Megatron -> Hugging Face: bytes, refusals, and what is left when something fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.safetensors_writer import SafetensorsFile
from megatron_fp32.checkpoint.formats.section import to_disk
from megatron_fp32.checkpoint.formats.torch_dist_writer import DataFile
from megatron_fp32.checkpoint.jobs import read_back
from megatron_fp32.errors import CheckpointError
from tests.checkpoint.support import A_LOG, NORM, assets, resave, rewrite, stored_tensors, tree
from tests.conftest import Source
from tests.qwen3_5 import EVEN, write_small

_GATE, _UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]


def _with(**changed: Any) -> Change:
    """Replace or drop tensors: `_with(**{name: function or None})`."""

    def change(tensors: Tensors) -> Tensors:
        kept = {n: t for n, t in tensors.items() if changed.get(n, t) is not None}
        return {**kept, **{n: f(tensors.get(n)).contiguous() for n, f in changed.items() if f is not None}}

    return change


@pytest.fixture
def own(source: Source, tmp_path: Path) -> Path:
    """A copy of a source that a test may change."""
    return Path(shutil.copytree(source(), tmp_path / "own"))


class TestRoundTrip:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"tie_word_embeddings": True},
            {"all_bf16": True},
            EVEN,
            {"vocab_size": 1, "hidden_size": 6, "intermediate_size": 1},
            {"linear_conv_kernel_dim": 3, "num_attention_heads": 3, "num_key_value_heads": 1},
            {"layer_types": ["full_attention", "full_attention"]},
        ],
        ids=["odd", "tied", "all BF16", "even heads", "tiny", "one KV head", "attention only"],
    )
    def test_every_byte_comes_back(self, source: Source, imported: Source, tmp_path: Path, fields: Any) -> None:
        report = export_checkpoint(imported(**fields), tmp_path / "hf")
        original = stored_tensors(source(**fields))
        assert stored_tensors(tmp_path / "hf") == original
        assert assets(tmp_path / "hf") == assets(source(**fields))
        assert (report.widened, report.rounded) == ((), ())
        assert report.unchanged == report.tensors == len(original)
        assert report.nbytes == sum(len(data) for _, _, data in original.values())

    def test_the_source_is_as_hard_as_it_should_be(self, source: Source) -> None:
        stored = stored_tensors(source())
        assert {dtype for dtype, _, _ in stored.values()} == {"F32", "BF16"}
        assert sorted(n for n, (dtype, _, _) in stored.items() if dtype == "F32") == [A_LOG, NORM]
        norm = load_file(source() / "model.safetensors")[NORM]
        assert not torch.equal(norm.float() - 1 + 1, norm)  # only the kept original can give this back

    def test_a_source_of_many_files(self, source: Source, tmp_path: Path) -> None:
        Qwen3_5ForCausalLM.from_pretrained(source(), dtype=torch.bfloat16).save_pretrained(
            tmp_path / "many", max_shard_size="4KB"
        )
        assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
        import_checkpoint(tmp_path / "many", tmp_path / "megatron")
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=5000)
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
        assert stored_tensors(tmp_path / "hf") == stored_tensors(tmp_path / "many")

    def test_files_that_are_no_weights_come_back_byte_for_byte(self, own: Path, tmp_path: Path) -> None:
        (own / "tokenizer.json").write_bytes(b'{"\xff\x00": 1}\r\n')
        (own / "config.json").write_text("\n" + (own / "config.json").read_text().replace("  ", "\t"))
        (own / "pytorch_model.bin").write_bytes(b"weights in another format")
        import_checkpoint(own, tmp_path / "megatron")
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
        (own / "pytorch_model.bin").unlink()
        assert assets(tmp_path / "hf") == assets(own)

    def test_special_values_come_back(self, own: Path, tmp_path: Path) -> None:
        patterns = torch.tensor([0x7FC00001, 0xFF800001, 0x80000000, 0x00000001, 0x7F800000], dtype=torch.int64)
        floats = patterns.to(torch.int32).view(torch.float32)
        rewrite(
            own,
            _with(
                **{
                    A_LOG: lambda t: floats.repeat(2)[: t.numel()],
                    NORM: lambda t: torch.cat([floats[2:], t])[: t.numel()],
                    _GATE: lambda t: torch.arange(t.numel()).to(torch.int16).view(torch.bfloat16).reshape(t.shape),
                }
            ),
        )
        import_checkpoint(own, tmp_path / "megatron")
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
        assert stored_tensors(tmp_path / "hf") == stored_tensors(own)


class TestReleasedNames:
    @pytest.fixture(scope="class")
    def released(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_small(tmp_path_factory.mktemp("released") / "hf", released_names=True)

    def test_text_only_leaves_the_vision_tensors_out_and_lists_them(self, released: Path, tmp_path: Path) -> None:
        stored = stored_tensors(released)
        vision = {name for name in stored if name.startswith("model.visual.")}
        report = import_checkpoint(released, tmp_path / "megatron", text_only=True)
        assert vision
        assert set(report.left_out) == vision
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
        assert stored_tensors(tmp_path / "hf") == {n: t for n, t in stored.items() if n not in vision}

    def test_without_it_they_are_refused(self, released: Path, tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"of its vision part.*model\.visual\..*vision='carry' .* text_only=True"
        ):
            import_checkpoint(released, tmp_path / "megatron")
        assert list(tmp_path.iterdir()) == []


class TestImportRefuses:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({A_LOG: None}, rf"1 missing tensors: {A_LOG}"),
            ({"model.extra": lambda _: torch.zeros(1)}, r"1 unexpected tensors: model\.extra"),
            ({NORM: lambda t: t[1:]}, rf"1 misshapen tensors: {NORM} \(21,\) \(expected \(22,\)\)"),
            ({_GATE: lambda t: t.t()}, rf"misshapen tensors: {_GATE}"),
            ({_GATE: lambda t: t.float()}, r"cannot hold the dtypes torch\.bfloat16, torch\.float32 of .*up_proj"),
            ({A_LOG: lambda t: t.to(torch.float8_e4m3fn)}, "float8_e4m3fn; expected a floating-point dtype of 16 bits"),
            ({A_LOG: lambda t: t.int()}, "torch.int32; expected a floating-point dtype"),
        ],
        ids=["missing", "unexpected", "misshapen", "transposed", "mixed dtypes", "FP8", "integers"],
    )
    def test_what_does_not_match_the_config(self, own: Path, tmp_path: Path, changed: Any, message: str) -> None:
        rewrite(own, _with(**changed))
        before = tree(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(own, tmp_path / "megatron")
        assert tree(tmp_path) == before

    def test_every_problem_is_named_at_once(self, own: Path, tmp_path: Path) -> None:
        rewrite(own, _with(**{A_LOG: None, "model.extra": lambda _: torch.zeros(1), NORM: lambda t: t[1:]}))
        with pytest.raises(CheckpointError, match=r"A_log.*model\.extra.*norm\.weight"):
            import_checkpoint(own, tmp_path / "megatron")

    def test_a_tied_config_with_a_head_of_its_own(self, own: Path, tmp_path: Path) -> None:
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        with pytest.raises(
            CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight have different values"
        ):
            import_checkpoint(own, tmp_path / "megatron")

    def test_a_directory_without_config(self, own: Path, tmp_path: Path) -> None:
        (own / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no config\.json in .*Hugging Face model directory"):
            import_checkpoint(own, tmp_path / "megatron")

    def test_a_config_that_is_no_json(self, own: Path, tmp_path: Path) -> None:
        (own / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config\.json is not a JSON"):
            import_checkpoint(own, tmp_path / "megatron")


def _drop(name: str) -> Change:
    return _with(**{name: None})


class TestExportRefuses:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (_drop("decoder.final_layernorm.weight"), r"1 missing tensors: decoder\.final_layernorm\.weight"),
            (_with(**{"decoder.extra": lambda _: torch.zeros(1)}), r"1 unexpected tensors: decoder\.extra"),
            (
                _with(**{"decoder.final_layernorm.weight": lambda t: t[1:]}),
                r"misshapen tensors: decoder\.final_layernorm\.weight \(26,\) \(expected \(27,\)\)",
            ),
            (_with(**{"embedding.word_embeddings.weight": lambda t: t[1:]}), r"word_embeddings\.weight \(56, 27\)"),
        ],
        ids=["missing", "unexpected", "misshapen", "short vocabulary"],
    )
    def test_another_model(self, imported: Source, tmp_path: Path, change: Change, message: str) -> None:
        trained = resave(imported(), tmp_path / "trained", change)
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(trained, tmp_path / "hf", source=imported())
        assert [p.name for p in tmp_path.iterdir()] == ["trained"]

    def test_a_source_with_other_tensors(self, imported: Source, tmp_path: Path) -> None:
        other = Path(shutil.copytree(imported(), tmp_path / "other"))
        listing = json.loads((other / "hf_source" / "source.json").read_text())
        del listing["tensors"][A_LOG]
        (other / "hf_source" / "source.json").write_text(json.dumps(listing))
        with pytest.raises(CheckpointError, match=f"its tensors differ from the imported tensors: {A_LOG}"):
            export_checkpoint(other, tmp_path / "hf")

    def test_a_checkpoint_without_its_source(self, imported: Source, tmp_path: Path) -> None:
        shutil.copytree(imported() / "release", tmp_path / "moved")
        with pytest.raises(CheckpointError, match="source=DIR"):
            export_checkpoint(tmp_path / "moved", tmp_path / "hf")
        export_checkpoint(tmp_path / "moved", tmp_path / "hf", source=imported())

    def test_a_damaged_original(self, imported: Source, tmp_path: Path) -> None:
        made = Path(shutil.copytree(imported(), tmp_path / "made"))
        originals = made / "hf_source" / "originals"

        def last_bit(t: Tensor) -> Tensor:
            """Another small value that is stored as the same w - 1."""
            flipped = (t.view(torch.int32) ^ 1).view(torch.float32)
            return torch.where((flipped - 1) == (t - 1), flipped, t)

        rewrite(originals, _with(**{NORM: last_bit}))
        assert stored_tensors(originals) != stored_tensors(imported() / "hf_source" / "originals")
        with pytest.raises(CheckpointError, match=NORM):
            export_checkpoint(made, tmp_path / "hf")


class TestOutput:
    @pytest.mark.parametrize("kind", ["file", "empty directory", "full directory"])
    def test_what_exists_is_refused_and_untouched(
        self, source: Source, imported: Source, tmp_path: Path, kind: str
    ) -> None:
        out = tmp_path / "out"
        if kind == "file":
            out.write_text("mine")
        else:
            out.mkdir()
            if kind == "full directory":
                (out / "mine").write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(CheckpointError, match="out exists already"):
            import_checkpoint(source(), out)
        with pytest.raises(CheckpointError, match="out exists already"):
            export_checkpoint(imported(), out)
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("writer", [DataFile, SafetensorsFile])
    def test_what_fails_because_of_the_data_leaves_nothing(
        self, source: Source, imported: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: type
    ) -> None:
        convert, made = (import_checkpoint, source()) if writer is DataFile else (export_checkpoint, imported())
        _fail_on(monkeypatch, writer, call=5, error=CheckpointError("damaged"))
        with pytest.raises(CheckpointError, match="damaged"):
            convert(made, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_refused_import_leaves_no_parents_behind(self, own: Path, tmp_path: Path) -> None:
        rewrite(own, _with(**{A_LOG: None}))
        with pytest.raises(CheckpointError, match="missing tensors"):
            import_checkpoint(own, tmp_path / "new" / "deep" / "megatron")
        assert [p.name for p in tmp_path.iterdir()] == ["own"]

    def test_the_name_appears_only_when_all_is_there(
        self, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[bool] = []
        import_checkpoint(source(), tmp_path / "m", progress=lambda *_: seen.append((tmp_path / "m").exists()))
        export_checkpoint(tmp_path / "m", tmp_path / "hf", progress=lambda *_: seen.append((tmp_path / "hf").exists()))
        assert seen
        assert not any(seen)

    def test_progress_adds_up(self, source: Source, tmp_path: Path) -> None:
        told: dict[str, list[tuple[int, int]]] = {}

        def tell(action: str, nbytes: int, total: int) -> None:
            told.setdefault(action, []).append((nbytes, total))

        import_checkpoint(source(), tmp_path / "m", progress=tell)
        total = sum(len(data) for _, _, data in stored_tensors(source()).values())
        assert told.keys() == {"write", "verify"}
        for calls in told.values():
            assert sum(nbytes for nbytes, _ in calls) == total
            assert {t for _, t in calls} == {total}

    def test_one_mapping_is_read_at_a_time(
        self, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        _record(monkeypatch, HuggingFaceReader, "read", events)
        _record(monkeypatch, DataFile, "write", events)
        import_checkpoint(source(), tmp_path / "m")
        runs = "".join("r" if event == "read" else "w" for event in events).split("w")
        assert max(len(reads) for reads in runs) == 3  # q, k and v


@pytest.mark.parametrize("damage", ["a flipped bit", "a lost end"])
class TestVerification:
    def test_an_import_notices(
        self, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
    ) -> None:
        _damage(monkeypatch, damage)
        with pytest.raises(CheckpointError, match=r"has other values on the disk|is damaged"):
            import_checkpoint(source(), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_an_export_notices(
        self, imported: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
    ) -> None:
        made = imported()
        _damage(monkeypatch, damage)
        with pytest.raises(CheckpointError, match=r"has other values on the disk|cannot be read back"):
            export_checkpoint(made, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def _fail_on(monkeypatch: pytest.MonkeyPatch, writer: type, *, call: int, error: BaseException) -> None:
    write, calls = writer.write, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise error
        write(self, *args, **kwargs)

    monkeypatch.setattr(writer, "write", failing)


def _record(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, events: list[str]) -> None:
    original = getattr(owner, method)

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        events.append(method)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, recording)


def _damage(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """Let the disk flip one bit in the middle of every file that it is given, or lose the other half."""

    def damaging(path: Path) -> None:
        to_disk(path)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle] ^= 1
        path.write_bytes(content if damage == "a flipped bit" else content[:middle])

    monkeypatch.setattr(read_back, "to_disk", damaging)


def test_the_padding_of_the_vocabulary_is_cut_off(imported: Source, source: Source, tmp_path: Path) -> None:
    def pad(t: Tensor) -> Tensor:
        return torch.cat([t, torch.full((7, t.shape[1]), torch.nan, dtype=t.dtype)])

    padded = _with(**{"embedding.word_embeddings.weight": pad, "output_layer.weight": pad})
    trained = resave(imported(), tmp_path / "trained", padded)
    report = export_checkpoint(trained, tmp_path / "hf", source=imported())
    assert {name: rows.rows for name, rows in report.cut_rows.items()} == dict.fromkeys(
        ("embedding.word_embeddings.weight", "output_layer.weight"), 7
    )
    assert stored_tensors(tmp_path / "hf") == stored_tensors(source())
