"""What users see when they give a command another directory than it needs: the message names it and says what to do."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.errors import CheckpointError
from megatron_fp32.models.provider import read_hf_config
from tests.support import refused, run_command

TRACKER = "latest_checkpointed_iteration.txt"

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


class TestTracker:
    @pytest.fixture
    def run(self, megatron: Path, tmp_path: Path) -> Path:
        """Iterations 10 and 20, and 30, whose save was interrupted."""
        for number in (10, 20):
            shutil.copytree(megatron / "release", tmp_path / f"run/iter_{number:07d}")
        (tmp_path / "run/iter_0000030").mkdir()
        (tmp_path / "run/iter_0000030/__0_0.distcp").write_bytes(b"")
        return tmp_path / "run"

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("40", "names iteration 40, but there is no iter_0000040"),
            (
                "30",
                "names iteration 30, but {run}/iter_0000030 is incomplete: it has no .metadata, which a save "
                "writes last",
            ),
            ("release", "names 'release', but there is no release"),
            ("latest", "must hold 'release' or the number of an iteration, got 'latest'"),
            ("", "must hold 'release' or the number of an iteration, got ''"),
        ],
    )
    def test_one_that_names_no_checkpoint(self, run: Path, tmp_path: Path, text: str, problem: str) -> None:
        (run / TRACKER).write_text(text)
        expected = f"{run / TRACKER} {problem.format(run=run)}; there is iter_0000010, iter_0000020. Pass"
        for command in (("export", run, tmp_path / "out"), ("inspect", run), ("verify", run, run)):
            message = refused(*command, status=1 if command[0] == "export" else 2)
            assert expected in message
            assert f"such as {run / 'iter_0000020'}" in message

    def test_none(self, run: Path, tmp_path: Path) -> None:
        for message in (refused("export", run, tmp_path / "out"), refused("inspect", run, status=2)):
            assert f"{run} has no tracker file {TRACKER}" in message
            assert "there is iter_0000010, iter_0000020" in message

    def test_what_it_suggests_works(self, run: Path, tmp_path: Path, megatron: Path) -> None:
        assert run_command("export", run / "iter_0000020", tmp_path / "out", "--source", megatron).exit_code == 0

    def test_an_incomplete_iteration(self, run: Path, tmp_path: Path) -> None:
        message = refused("export", run / "iter_0000030", tmp_path / "out")
        assert f"{run / 'iter_0000030'} is an incomplete checkpoint: it has no .metadata" in message

    def test_no_complete_one(self, tmp_path: Path) -> None:
        (tmp_path / "run/iter_0000020").mkdir(parents=True)
        (tmp_path / "run" / TRACKER).write_text("30")
        message = refused("export", tmp_path / "run", tmp_path / "out")
        assert "names iteration 30, but there is no iter_0000030; there is iter_0000020, without .metadata" in message

    def test_megatrons_older_format(self, tmp_path: Path) -> None:
        rank = tmp_path / "run/iter_0000020/mp_rank_00"
        rank.mkdir(parents=True)
        (rank / "model_optim_rng.pt").write_bytes(b"")
        (tmp_path / "run" / TRACKER).write_text("20")
        message = refused("export", tmp_path / "run", tmp_path / "out")
        assert f"{rank.parent} holds a checkpoint in Megatron's legacy format" in message
        assert "--ckpt-convert-format torch_dist --ckpt-convert-save" in message

    def test_no_checkpoint_at_all(self, tmp_path: Path) -> None:
        message = refused("export", tmp_path, tmp_path / "out")
        assert f"{tmp_path} is not a Megatron torch_dist checkpoint" in message
        assert f"(found neither {tmp_path / '.metadata'} nor {tmp_path / TRACKER})" in message


class TestGitLfs:
    @pytest.mark.parametrize(
        "name", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"]
    )
    def test_of_a_hugging_face_checkpoint(self, hf: Path, tmp_path: Path, name: str) -> None:
        (hf / name).write_text(POINTER)
        if name.endswith("index.json"):
            (hf / "model.safetensors").unlink()
        out = tmp_path / "out"
        commands: list[tuple[str | Path, ...]] = [("import", hf, out), ("quantize", hf, out, "--scheme", "blockwise")]
        if name != "tokenizer.json":  # a comparison does not need it
            commands.append(("inspect", hf))
        for command in commands:
            message = refused(*command, status=2 if command[0] == "inspect" else 1)
            assert f"{hf / name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {hf}\n" in message
        assert not list(tmp_path.glob("*out*"))

    @pytest.mark.parametrize(
        "name",
        [f"release/{name}" for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp")]
        + [TRACKER, "hf_source/source.json", "hf_source/assets/config.json", "hf_source/assets/tokenizer.json"],
    )
    def test_of_a_megatron_checkpoint(self, megatron: Path, tmp_path: Path, name: str) -> None:
        (megatron / name).write_text(POINTER)
        message = refused("export", megatron, tmp_path / "out")
        assert f"{megatron / name} is a Git LFS pointer" in message
        assert f"git lfs pull` in {(megatron / name).parent}" in message

    def test_of_a_format_to_take(self, hf: Path, original: Path, tmp_path: Path) -> None:
        (hf / "config.json").write_text(POINTER)
        message = refused("quantize", original, tmp_path / "out", "--like", hf)
        assert f"{hf / 'config.json'} is a Git LFS pointer" in message

    def test_weights_in_other_formats_are_not_needed(self, hf: Path, tmp_path: Path) -> None:
        (hf / "pytorch_model.bin").write_text(POINTER)
        assert run_command("import", hf, tmp_path / "out").exit_code == 0

    def test_several_are_counted(self, hf: Path, tmp_path: Path) -> None:
        for name in ("tokenizer.json", "vocab.json"):
            (hf / name).write_text(POINTER)
        assert "(and 1 more files are)" in refused("import", hf, tmp_path / "out")


class TestWhatIsInTheDirectory:
    def test_import_of_a_megatron_checkpoint(self, megatron: Path, tmp_path: Path) -> None:
        for given in (megatron, megatron / "release"):
            message = refused("import", given, tmp_path / "out")
            assert f"{given} is a Megatron checkpoint, but import reads a Hugging Face checkpoint" in message
            assert f"megatron-fp32 export {given} HF_DIR" in message

    def test_export_of_a_hugging_face_checkpoint(self, hf: Path, tmp_path: Path) -> None:
        message = refused("export", hf, tmp_path / "out")
        assert f"{hf} is a Hugging Face checkpoint, but export reads a Megatron checkpoint" in message
        assert f"megatron-fp32 import {hf} MEGATRON_DIR" in message

    def test_quantize_of_a_megatron_checkpoint(self, megatron: Path, tmp_path: Path) -> None:
        message = refused("quantize", megatron, tmp_path / "out", "--scheme", "channelwise")
        assert f"megatron-fp32 export {megatron} FP8_DIR --fp8 channelwise" in message

    def test_a_source_that_is_a_hugging_face_checkpoint(self, hf: Path, megatron: Path, tmp_path: Path) -> None:
        message = refused("export", megatron / "release", tmp_path / "out", "--source", hf)
        assert f"{hf} does not hold hf_source" in message
        assert "is a Hugging Face checkpoint: run megatron-fp32 import, and pass the directory that it makes" in message

    @pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
    def test_weights_behind_a_link_that_leads_nowhere(self, hf: Path, original: Path, name: str) -> None:
        (hf / "model.safetensors").unlink()
        (hf / name).symlink_to("../../blobs/4d7a2146")
        for command in (("inspect", hf), ("verify", hf, original), ("verify", original, hf)):
            message = refused(*command, status=2)
            assert f"{hf / name} is a link to ../../blobs/4d7a2146, which cannot be reached: download" in message

    def test_metadata_behind_a_link_that_leads_nowhere(self, megatron: Path) -> None:
        (megatron / "release" / ".metadata").unlink()
        (megatron / "release" / ".metadata").symlink_to("gone")
        message = refused("inspect", megatron / "release", status=2)
        assert f"{megatron / 'release' / '.metadata'} is a link to gone, which cannot be reached" in message

    @pytest.mark.parametrize("scheme", ["blockwise", "channelwise"])
    def test_a_source_that_is_quantized(self, original: Path, tmp_path: Path, scheme: str) -> None:
        assert run_command("quantize", original, tmp_path / "fp8", "--scheme", scheme).exit_code == 0
        message = refused("import", tmp_path / "fp8", tmp_path / "out")
        assert f"{tmp_path / 'fp8'}: " in message
        assert "weights are quantized to F8_E4M3 and have scales: model.layers.0." in message
        assert "import the checkpoint that was quantized" in message

    def test_a_source_that_does_not_exist(self, megatron: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no/such/directory does not exist$"):
            export_checkpoint(megatron, tmp_path / "out", source="no/such/directory")

    @pytest.mark.parametrize("argument", ["hf_dir", "out"])
    def test_a_path_with_a_null_byte(self, original: Path, tmp_path: Path, argument: str) -> None:
        paths = {"hf_dir": str(original), "out": str(tmp_path / "out"), argument: "a\0b"}
        with pytest.raises(ValueError, match=rf"^{argument} must be a path, got a text with a null byte: 'a\\x00b'$"):
            import_checkpoint(**paths)

    def test_a_config_that_is_not_there(self, hf: Path, tmp_path: Path) -> None:
        (hf / "config.json").unlink()
        message = refused("import", hf, tmp_path / "out")
        assert f"no config.json in {hf}: is it a Hugging Face model directory?" in message
        with pytest.raises(FileNotFoundError, match=r"no config\.json in .*is it a Hugging Face model directory"):
            read_hf_config(hf)

    def test_a_download_that_was_interrupted(self, hf: Path, tmp_path: Path) -> None:
        (hf / "model.safetensors").unlink()
        (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
        message = refused("import", hf, tmp_path / "out")
        assert f"{hf / 'model-00001-of-00002.safetensors'} is missing" in message
        assert "run hf download again" in message

    def test_weights_of_another_format(self, hf: Path, tmp_path: Path) -> None:
        (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
        for message in (refused("import", hf, tmp_path / "out"), refused("inspect", hf, status=2)):
            assert f"{hf} holds neither model.safetensors nor" in message
            assert "pytorch_model.bin" in message
            assert "save_pretrained" in message

    def test_a_folder_of_the_hub_cache(self, hf: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--Qwen--Qwen3-8B/snapshots/b968826d"
        snapshot.parent.mkdir(parents=True)
        hf.rename(snapshot)
        message = refused("import", snapshot.parents[1], tmp_path / "out")
        assert f"pass the snapshot in it, such as {snapshot}" in message


class TestHubId:
    @pytest.mark.parametrize("given", ["Qwen/Qwen3-8B", "https://huggingface.co/Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B"])
    @pytest.mark.parametrize("command", ["import", "quantize", "inspect", "verify"])
    def test_on_the_command_line_without_huggingface_hub(
        self, given: str, command: str, tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        more = {"import": [tmp_path / "out"], "quantize": [tmp_path / "out", "--scheme", "blockwise"]}
        message = refused(
            command, given, *more.get(command, []), *([original] if command == "verify" else []), status=2
        )
        assert "does not exist" in message
        assert "hf download Qwen/Qwen3-8B --local-dir Qwen3-8B" in message
        assert "Or let this command download it: huggingface_hub is not installed. Install it: pip install " in message
        assert "'megatron_fp32[hub]'" in message

    def test_of_a_checkpoint_that_is_not_fetched(self, tmp_path: Path) -> None:
        message = refused("export", "Qwen/Qwen3-8B@v1", tmp_path / "out", status=2)
        assert "hf download Qwen/Qwen3-8B --revision v1 --local-dir Qwen3-8B" in message

    def test_in_python(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="hf download Qwen/Qwen3-8B --local-dir Qwen3-8B"):
            import_checkpoint("Qwen/Qwen3-8B", tmp_path / "out")
        with pytest.raises(FileNotFoundError, match="hf download Qwen/Qwen3-8B --local-dir Qwen3-8B"):
            read_hf_config("Qwen/Qwen3-8B")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("given", ["/data/model", "model", "data/models/qwen"])
    def test_other_paths_are_only_missing(self, given: str, tmp_path: Path) -> None:
        message = refused("import", given, tmp_path / "out", status=2)
        assert "does not exist." in message
        assert "hf download" not in message
