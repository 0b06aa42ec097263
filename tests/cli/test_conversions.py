from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_fp32
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.formats.torch_dist_writer import TorchDistWriter
from tests.checkpoint.support import A_LOG, assets, stored_tensors, tree
from tests.qwen3_5 import write_small
from tests.support import run_command


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("cli") / "hf", released_names=True)


def test_there_and_back(hf: Path, tmp_path: Path) -> None:
    there = run_command("import", "--text-only", hf, tmp_path / "megatron")
    assert there.exit_code == 0, there.output
    stored = stored_tensors(hf)
    vision = {name for name in stored if name.startswith("model.visual.")}
    text = {name: tensor for name, tensor in stored.items() if name not in vision}
    assert f"{len(text)} tensors" in there.stdout
    assert "2 of them F32" in there.stdout
    listed = there.stdout.split("left out, as asked")[1]
    assert listed.startswith(f" ({len(vision)}):")
    assert {line.strip() for line in listed.splitlines()[1:]} == vision

    back = run_command("export", tmp_path / "megatron", tmp_path / "hf")
    assert back.exit_code == 0, back.output
    assert f"{len(text)} of them as they came from Hugging Face" in back.stdout
    assert stored_tensors(tmp_path / "hf") == text
    assert assets(tmp_path / "hf") == assets(hf)


def test_what_is_carried_is_counted_and_comes_back(hf: Path, tmp_path: Path) -> None:
    there = run_command("import", "--vision", "carry", hf, tmp_path / "megatron")
    assert there.exit_code == 0, there.output
    vision = [name for name in stored_tensors(hf) if name.startswith("model.visual.")]
    assert f"carried in hf_source/ as they are: {len(vision)}" in there.stdout
    back = run_command("export", tmp_path / "megatron", tmp_path / "hf")
    assert back.exit_code == 0, back.output
    assert stored_tensors(tmp_path / "hf") == stored_tensors(hf)


def test_nothing_is_listed_where_nothing_was_left_out(hf: Path, tmp_path: Path) -> None:
    plain = write_small(tmp_path / "plain")
    result = run_command("import", plain, tmp_path / "megatron")
    assert result.exit_code == 0, result.output
    assert "left out" not in result.stdout


def test_a_refusal_goes_to_stderr_with_status_1(hf: Path, tmp_path: Path) -> None:
    result = run_command("import", hf, tmp_path / "megatron")
    assert result.exit_code == 1
    assert "megatron-fp32: " in result.stderr
    assert "or --text-only to leave them out" in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_untouched(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    before = tree(tmp_path)
    result = run_command("import", "--text-only", hf, tmp_path)
    assert result.exit_code == 1
    assert "exists already" in result.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "gpt2"}', "'gpt2'"),
        ("config.json", "{", "is not a JSON"),
        ("model.safetensors", "garbage", "not a readable safetensors file"),
    ],
)
def test_a_damaged_source_is_a_message_not_a_traceback(
    hf: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for path in hf.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    (own / name).write_text(content)
    result = run_command("import", "--text-only", own, tmp_path / "megatron")
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert message in result.stderr


@pytest.mark.parametrize("name", ["run[bold]", "run[/bold]"])
def test_a_path_with_brackets_is_printed_as_it_is(hf: Path, tmp_path: Path, name: str) -> None:
    result = run_command("import", "--text-only", hf, tmp_path / name)
    assert (result.exit_code, result.exception) == (0, None)
    assert str(tmp_path / name / "release") in result.stdout


class TestExport:
    @pytest.fixture(scope="class")
    def imported(self, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("imported") / "megatron"
        assert run_command("import", "--text-only", hf, out).exit_code == 0
        return out

    @pytest.fixture
    def rounded(self, imported: Path, tmp_path: Path) -> Path:
        """As a trainer without fp32 parameters would save it."""
        reader = TorchDistReader(imported)
        out = tmp_path / "rounded"
        out.mkdir()
        with TorchDistWriter(out) as writer:
            for name in reader.tensors:
                writer.write(name, reader.read(name).bfloat16())
            writer.finish({})
        return out

    def test_a_checkpoint_from_elsewhere_needs_the_source(self, rounded: Path, tmp_path: Path) -> None:
        result = run_command("export", rounded, tmp_path / "out")
        assert result.exit_code == 1
        assert "--source" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_rounded_tensors_are_refused(self, rounded: Path, imported: Path, tmp_path: Path) -> None:
        result = run_command("export", rounded, tmp_path / "out", "--source", imported)
        assert result.exit_code == 1
        assert A_LOG.replace("model.", "model.language_model.", 1) in result.stderr
        assert "--allow-rounded" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_rounded_tensors_that_are_allowed_are_exported_and_still_no_success(
        self, rounded: Path, imported: Path, tmp_path: Path
    ) -> None:
        result = run_command("export", rounded, tmp_path / "out", "--source", imported, "--allow-rounded")
        assert result.exit_code == 1
        assert "rounded in the Megatron checkpoint: " in result.stdout
        assert A_LOG.replace("model.", "model.language_model.", 1) in result.stdout
        assert stored_tensors(tmp_path / "out").keys() == {
            name for name in json.loads((imported / "hf_source" / "source.json").read_text())["tensors"]
        }

    def test_parameters_trained_in_fp32_are_named(self, tmp_path: Path) -> None:
        plain = write_small(tmp_path / "plain", all_bf16=True)
        assert run_command("import", plain, tmp_path / "megatron").exit_code == 0
        reader = TorchDistReader(tmp_path / "megatron")
        (tmp_path / "trained").mkdir()
        with TorchDistWriter(tmp_path / "trained") as writer:
            for name in reader.tensors:
                tensor = reader.read(name)
                writer.write(name, tensor.float() + 1e-4 if name.endswith("A_log") else tensor)
            writer.finish({})
        result = run_command("export", tmp_path / "trained", tmp_path / "out", "--source", tmp_path / "megatron")
        assert result.exit_code == 0, result.output
        assert f"exported as F32: {A_LOG}" in result.stdout
        assert stored_tensors(tmp_path / "out")[A_LOG][0] == "F32"
        to_source = run_command(
            "export", tmp_path / "trained", tmp_path / "bf16", "--source", tmp_path / "megatron", "--dtype", "source"
        )
        assert to_source.exit_code == 0, to_source.output
        assert f"rounded to its dtype, as asked: {A_LOG}" in to_source.stdout
        dtype, _, data = stored_tensors(tmp_path / "bf16")[A_LOG]
        a_log = next(name for name in reader.tensors if name.endswith("A_log"))
        expected = (reader.read(a_log).float() + 1e-4).bfloat16()
        assert (dtype, data) == ("BF16", expected.view(torch.int16).numpy().tobytes())


class TestJson:
    def test_every_command_prints_one_object(self, tmp_path: Path) -> None:
        plain = write_small(tmp_path / "plain")
        stored = stored_tensors(plain)
        there = run_command("import", "--json", "--workers", "2", plain, tmp_path / "megatron")
        report = json.loads(there.stdout)
        assert (there.exit_code, report["tensors"], sorted(report["fp32_tensors"])) == (0, len(stored), _fp32(stored))
        back = run_command("export", "--json", "--max-shard-bytes", "5000", tmp_path / "megatron", tmp_path / "hf")
        report = json.loads(back.stdout)
        assert (back.exit_code, report["unchanged"], report["directory"]) == (0, len(stored), str(tmp_path / "hf"))
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
        quantized = run_command("quantize", "--json", "--scheme", "modelopt", plain, tmp_path / "fp8")
        report = json.loads(quantized.stdout)
        fp8 = [name for name, (dtype, _, _) in stored_tensors(tmp_path / "fp8").items() if dtype == "F8_E4M3"]
        assert (quantized.exit_code, sorted(report["quantized"])) == (0, sorted(fp8))


def _fp32(stored: dict[str, Any]) -> list[str]:
    return sorted(name for name, (dtype, _, _) in stored.items() if dtype == "F32")


class TestFloat8:
    def test_an_export_is_the_quantized_checkpoint(self, tmp_path: Path) -> None:
        plain = write_small(tmp_path / "plain")
        assert run_command("import", plain, tmp_path / "megatron").exit_code == 0
        for scheme in ("blockwise", "channelwise", "modelopt"):
            direct = run_command("quantize", plain, tmp_path / f"direct-{scheme}", "--scheme", scheme)
            assert direct.exit_code == 0, direct.output
            assert f"weights in float8 ({scheme})" in direct.stdout
            on_the_way = run_command("export", tmp_path / "megatron", tmp_path / scheme, "--fp8", scheme)
            assert on_the_way.exit_code == 0, on_the_way.output
            assert stored_tensors(tmp_path / scheme) == stored_tensors(tmp_path / f"direct-{scheme}")
            assert assets(tmp_path / scheme) == assets(tmp_path / f"direct-{scheme}")
            like = run_command(
                "export", tmp_path / "megatron", tmp_path / f"like-{scheme}", "--fp8-like", tmp_path / scheme
            )
            assert like.exit_code == 0, like.output
            assert stored_tensors(tmp_path / f"like-{scheme}") == stored_tensors(tmp_path / scheme)

    @pytest.mark.parametrize("args", [[], ["--scheme", "blockwise", "--like", "."], ["--scheme", "other"]])
    def test_one_format_must_be_named(self, hf: Path, tmp_path: Path, args: list[str]) -> None:
        assert run_command("quantize", hf, tmp_path / "fp8", *args).exit_code == 2
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ["import"],
        ["import", "no/such/directory", "out"],
        ["import", ".", "out", "--unknown"],
        ["import", ".", "out", "--vision", "convert"],
        ["import", ".", "out", "--mtp", "refuse"],
        ["export", "no/such/directory", "out"],
        ["export", ".", "out", "--source", "no/such/directory"],
        ["unknown"],
    ],
    ids=" ".join,
)
def test_a_mistake_on_the_command_line_has_status_2(args: list[str]) -> None:
    result = run_command(*args)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    ("command", "mentioned"),
    [
        ([], ["import", "export", "Exit status", "--version"]),
        (["import"], ["HF_DIR", "MEGATRON_DIR", "--vision", "--mtp", "--text-only", "must not exist"]),
        (["import"], ["--workers", "--json"]),
        (["export"], ["HF_DIR", "MEGATRON_DIR", "--source", "--allow-rounded", "must not exist"]),
        (["export"], ["--vocab-size", "--dtype", "--fp8", "--fp8-like", "--max-shard-bytes", "--workers", "--json"]),
        (["quantize"], ["HF_DIR", "FP8_DIR", "--scheme", "--like", "--device", "--max-shard-bytes", "--workers"]),
    ],
)
def test_help_mentions_every_option(command: list[str], mentioned: list[str], flag: str) -> None:
    result = run_command(*command, flag)
    assert result.exit_code == 0
    assert [text for text in mentioned if text not in result.stdout] == []


def test_the_version_is_that_of_the_package() -> None:
    result = run_command("--version")
    assert (result.exit_code, result.stdout) == (0, f"megatron-fp32, version {megatron_fp32.__version__}\n")
