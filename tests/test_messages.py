"""What users see when something is not as it should be: each message names the place and says what to do."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from megatron.core.models.gpt import gpt_layer_specs

from megatron_fp32 import cli
from megatron_fp32.checkpoint import convert, inspect
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.formats.torch_dist_writer import DataFile
from megatron_fp32.cli import inspect_text
from megatron_fp32.errors import CheckpointError
from megatron_fp32.extras import MissingPackageError
from megatron_fp32.models.provider import read_hf_config, transformer_config
from megatron_fp32.models.specs import decoder_block_spec, mtp_block_spec
from tests.checkpoint.support import rewrite, write_small
from tests.families import case

ROOT = Path(__file__).parents[1]

TRACKER = "latest_checkpointed_iteration.txt"

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case("Qwen3").write(tmp_path_factory.mktemp("messages") / "hf")


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    import_checkpoint(original, original.parent / "megatron")
    return original.parent / "megatron"


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    """A copy, for changes."""
    return Path(shutil.copytree(original, tmp_path / "hf"))


@pytest.fixture
def megatron(converted: Path, tmp_path: Path) -> Path:
    """A copy, for changes."""
    return Path(shutil.copytree(converted, tmp_path / "megatron"))


def _run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def _refused(*args: str | Path, status: int = 1) -> str:
    """What a command that must refuse says on stderr."""
    result = _run(*args)
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert (result.exit_code, result.stdout) == (status, "")
    return result.stderr


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
            message = _refused(*command, status=1 if command[0] == "export" else 2)
            assert expected in message
            assert f"such as {run / 'iter_0000020'}" in message

    def test_none(self, run: Path, tmp_path: Path) -> None:
        for message in (_refused("export", run, tmp_path / "out"), _refused("inspect", run, status=2)):
            assert f"{run} has no tracker file {TRACKER}" in message
            assert "there is iter_0000010, iter_0000020" in message

    def test_what_it_suggests_works(self, run: Path, tmp_path: Path, megatron: Path) -> None:
        assert _run("export", run / "iter_0000020", tmp_path / "out", "--source", megatron).exit_code == 0

    def test_an_incomplete_iteration(self, run: Path, tmp_path: Path) -> None:
        message = _refused("export", run / "iter_0000030", tmp_path / "out")
        assert f"{run / 'iter_0000030'} is an incomplete checkpoint: it has no .metadata" in message

    def test_no_complete_one(self, tmp_path: Path) -> None:
        (tmp_path / "run/iter_0000020").mkdir(parents=True)
        (tmp_path / "run" / TRACKER).write_text("30")
        message = _refused("export", tmp_path / "run", tmp_path / "out")
        assert "names iteration 30, but there is no iter_0000030; there is iter_0000020, without .metadata" in message

    def test_megatrons_older_format(self, tmp_path: Path) -> None:
        rank = tmp_path / "run/iter_0000020/mp_rank_00"
        rank.mkdir(parents=True)
        (rank / "model_optim_rng.pt").write_bytes(b"")
        (tmp_path / "run" / TRACKER).write_text("20")
        message = _refused("export", tmp_path / "run", tmp_path / "out")
        assert f"{rank.parent} holds a checkpoint in Megatron's legacy format" in message
        assert "--ckpt-convert-format torch_dist --ckpt-convert-save" in message

    def test_no_checkpoint_at_all(self, tmp_path: Path) -> None:
        message = _refused("export", tmp_path, tmp_path / "out")
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
            message = _refused(*command, status=2 if command[0] == "inspect" else 1)
            assert f"{hf / name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {hf}\n" in message
        assert not list(tmp_path.glob("*out*"))

    @pytest.mark.parametrize(
        "name",
        [f"release/{name}" for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp")]
        + [TRACKER, "hf_source/source.json", "hf_source/assets/config.json", "hf_source/assets/tokenizer.json"],
    )
    def test_of_a_megatron_checkpoint(self, megatron: Path, tmp_path: Path, name: str) -> None:
        (megatron / name).write_text(POINTER)
        message = _refused("export", megatron, tmp_path / "out")
        assert f"{megatron / name} is a Git LFS pointer" in message
        assert f"git lfs pull` in {(megatron / name).parent}" in message

    def test_of_a_format_to_take(self, hf: Path, original: Path, tmp_path: Path) -> None:
        (hf / "config.json").write_text(POINTER)
        message = _refused("quantize", original, tmp_path / "out", "--like", hf)
        assert f"{hf / 'config.json'} is a Git LFS pointer" in message

    def test_weights_in_other_formats_are_not_needed(self, hf: Path, tmp_path: Path) -> None:
        (hf / "pytorch_model.bin").write_text(POINTER)
        assert _run("import", hf, tmp_path / "out").exit_code == 0

    def test_several_are_counted(self, hf: Path, tmp_path: Path) -> None:
        for name in ("tokenizer.json", "vocab.json"):
            (hf / name).write_text(POINTER)
        assert "(and 1 more files are)" in _refused("import", hf, tmp_path / "out")


class TestWhatIsInTheDirectory:
    def test_import_of_a_megatron_checkpoint(self, megatron: Path, tmp_path: Path) -> None:
        for given in (megatron, megatron / "release"):
            message = _refused("import", given, tmp_path / "out")
            assert f"{given} is a Megatron checkpoint, and import reads a Hugging Face one" in message
            assert f"megatron-fp32 export {given} HF_DIR" in message

    def test_export_of_a_hugging_face_checkpoint(self, hf: Path, tmp_path: Path) -> None:
        message = _refused("export", hf, tmp_path / "out")
        assert f"{hf} is a Hugging Face checkpoint, and export reads a Megatron one" in message
        assert f"megatron-fp32 import {hf} MEGATRON_DIR" in message

    def test_quantize_of_a_megatron_checkpoint(self, megatron: Path, tmp_path: Path) -> None:
        message = _refused("quantize", megatron, tmp_path / "out", "--scheme", "channelwise")
        assert f"megatron-fp32 export {megatron} FP8_DIR --fp8 channelwise" in message

    def test_a_source_that_is_a_hugging_face_checkpoint(self, hf: Path, megatron: Path, tmp_path: Path) -> None:
        message = _refused("export", megatron / "release", tmp_path / "out", "--source", hf)
        assert f"{hf} does not hold hf_source" in message
        assert "is a Hugging Face checkpoint: run megatron-fp32 import, and pass the directory that it makes" in message

    @pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
    def test_weights_behind_a_link_that_leads_nowhere(self, hf: Path, original: Path, name: str) -> None:
        (hf / "model.safetensors").unlink()
        (hf / name).symlink_to("../../blobs/4d7a2146")
        for command in (("inspect", hf), ("verify", hf, original), ("verify", original, hf)):
            message = _refused(*command, status=2)
            assert f"{hf / name} is a link to ../../blobs/4d7a2146, which cannot be reached: download" in message

    def test_metadata_behind_a_link_that_leads_nowhere(self, megatron: Path) -> None:
        (megatron / "release" / ".metadata").unlink()
        (megatron / "release" / ".metadata").symlink_to("gone")
        message = _refused("inspect", megatron / "release", status=2)
        assert f"{megatron / 'release' / '.metadata'} is a link to gone, which cannot be reached" in message

    @pytest.mark.parametrize("scheme", ["blockwise", "channelwise"])
    def test_a_source_that_is_quantized(self, original: Path, tmp_path: Path, scheme: str) -> None:
        assert _run("quantize", original, tmp_path / "fp8", "--scheme", scheme).exit_code == 0
        message = _refused("import", tmp_path / "fp8", tmp_path / "out")
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
        message = _refused("import", hf, tmp_path / "out")
        assert f"no config.json in {hf}: is it a Hugging Face model directory?" in message
        with pytest.raises(FileNotFoundError, match=r"no config\.json in .*is it a Hugging Face model directory"):
            read_hf_config(hf)

    def test_a_download_that_was_interrupted(self, hf: Path, tmp_path: Path) -> None:
        (hf / "model.safetensors").unlink()
        (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
        message = _refused("import", hf, tmp_path / "out")
        assert f"{hf / 'model-00001-of-00002.safetensors'} is missing" in message
        assert "run hf download again" in message

    def test_weights_of_another_format(self, hf: Path, tmp_path: Path) -> None:
        (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
        for message in (_refused("import", hf, tmp_path / "out"), _refused("inspect", hf, status=2)):
            assert f"{hf} holds neither model.safetensors nor" in message
            assert "pytorch_model.bin" in message
            assert "save_pretrained" in message

    def test_a_folder_of_the_hub_cache(self, hf: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--Qwen--Qwen3-8B/snapshots/b968826d"
        snapshot.parent.mkdir(parents=True)
        hf.rename(snapshot)
        message = _refused("import", snapshot.parents[1], tmp_path / "out")
        assert f"pass the snapshot in it, such as {snapshot}" in message


class TestHubId:
    @pytest.mark.parametrize("given", ["Qwen/Qwen3-8B", "https://huggingface.co/Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B"])
    @pytest.mark.parametrize("command", ["import", "quantize", "inspect", "verify"])
    def test_on_the_command_line_without_huggingface_hub(
        self, given: str, command: str, tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        more = {"import": [tmp_path / "out"], "quantize": [tmp_path / "out", "--scheme", "blockwise"]}
        message = _refused(
            command, given, *more.get(command, []), *([original] if command == "verify" else []), status=2
        )
        assert "does not exist" in message
        assert "hf download Qwen/Qwen3-8B --local-dir Qwen3-8B" in message
        assert "Or let this command download it: huggingface_hub is not installed. Install it: pip install " in message
        assert "'megatron_fp32[hub]'" in message

    def test_of_a_checkpoint_that_is_not_fetched(self, tmp_path: Path) -> None:
        message = _refused("export", "Qwen/Qwen3-8B@v1", tmp_path / "out", status=2)
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
        message = _refused("import", given, tmp_path / "out", status=2)
        assert "does not exist." in message
        assert "hf download" not in message


class TestNames:
    @pytest.mark.parametrize(
        ("prefix", "remedy"),
        [
            ("base_model.model.", "merge_and_unload"),
            ("module.", "DistributedDataParallel"),
            ("_orig_mod.", "torch.compile"),
            ("transformer.", "Rename its tensors"),
        ],
    )
    def test_another_prefix(self, hf: Path, tmp_path: Path, prefix: str, remedy: str) -> None:
        rewrite(hf, lambda tensors: {prefix + name: t for name, t in tensors.items()})
        message = _refused("import", hf, tmp_path / "out")
        assert f"{hf}: there is no text model" in message
        assert f"{prefix}model.embed_tokens.weight" in message
        assert f"start with '{prefix}model.', where 'model.' is expected" in message
        assert remedy in message

    def test_no_embedding(self, hf: Path, tmp_path: Path) -> None:
        rewrite(hf, lambda _: {"encoder.weight": torch.ones(2)})
        message = _refused("import", hf, tmp_path / "out")
        assert f"{hf}: there is no text model" in message
        assert "its tensors are encoder.weight" in message

    def test_an_unsupported_family(self, hf: Path, tmp_path: Path) -> None:
        config = json.loads((hf / "config.json").read_text())
        changed = {**config, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        (hf / "config.json").write_text(json.dumps(changed))
        message = _refused("import", hf, tmp_path / "out")
        for part in (f"{hf}: ", "'gemma3_text'", "Gemma3ForCausalLM", "Qwen3-MoE (qwen3_moe,", "Llama (llama)"):
            assert part in message
        assert "megatron_fp32/weights/families/ and list it in registry.py" in message

    @pytest.mark.parametrize("name", ["mtp.layers.x.norm.weight", "mtp.layers.-1.norm.weight", "mtp.layers."])
    def test_an_mtp_layer_without_a_number(self, tmp_path: Path, name: str) -> None:
        hf = write_small(tmp_path / "hf")
        rewrite(hf, lambda tensors: {**tensors, name: torch.ones(2)})
        message = _refused("import", hf, tmp_path / "out")
        assert (
            f"{hf}: the tensor {name!r} does not name a layer: expected mtp.layers.N., where N is a number" in message
        )

    def test_a_shape_in_the_sidecar(self, megatron: Path, tmp_path: Path) -> None:
        path, name = megatron / "hf_source/source.json", "model.layers.0.mlp.gate_proj.weight"
        content = json.loads(path.read_text())
        content["tensors"][name]["shape"] = [3, 4]
        path.write_text(json.dumps(content))
        message = _refused("export", megatron, tmp_path / "out")
        assert f"{path} gives {name!r} the shape (3, 4)" in message
        assert "the shape is (22, 36)" in message
        assert not list(tmp_path.glob(".out*"))


class TestOperatingSystem:
    @pytest.mark.parametrize(
        ("number", "remedy"),
        [
            (errno.ENOSPC, "make room on that disk"),
            (errno.EDQUOT, "quota"),
            (errno.EMFILE, "ulimit -n"),
            (errno.EFBIG, "lower --max-part-bytes, or raise the limit"),
        ],
    )
    def test_an_error_that_names_no_file(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(DataFile, "write", full)
        message = _refused("import", original, tmp_path / "out")
        partial = tmp_path / ".out.partial"
        assert f"{partial}: {os.strerror(number)}. What to do: " in message
        assert remedy in message
        assert f"What is finished stays in {partial}: run the same command again" in message
        with pytest.raises(OSError, match=r"out\.partial") as caught:
            import_checkpoint(original, tmp_path / "out")
        assert (caught.value.errno, caught.value.filename) == (number, str(partial))
        monkeypatch.undo()
        assert _run("import", original, tmp_path / "out").exit_code == 0

    def test_an_error_that_names_a_file_keeps_it(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def denied(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "/some/file")

        monkeypatch.setattr(DataFile, "write", denied)
        message = _refused("import", original, tmp_path / "out")
        assert "/some/file: Permission denied. What to do: give yourself permission" in message

    def test_of_workers(self, megatron: Path, tmp_path: Path) -> None:
        """The kernel's own refusal, which names no file, in another process than the one that tells of it."""
        limit = (8192, 8192)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "megatron_fp32", "export", str(megatron), str(tmp_path / "out")),
                *("--workers", "2", "--max-shard-bytes", "20000"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert "Traceback" not in done.stderr
        assert f"{tmp_path / '.out.partial'}: File too large. What to do: lower --max-shard-bytes" in done.stderr
        assert "run the same command again" in done.stderr


class TestInterruption:
    """Ctrl-C is no traceback: status 130, and what to do."""

    def test_while_it_converts(self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(DataFile, "write", interrupted)
        message = _refused("import", original, tmp_path / "out", status=130)
        partial = tmp_path / ".out.partial"
        assert f"interrupted. What is finished stays in {partial}: run the same command again to go on" in message
        monkeypatch.undo()
        assert _run("import", original, tmp_path / "out").exit_code == 0

    @pytest.mark.parametrize("target", ["import_checkpoint", "export_checkpoint"])
    def test_before_anything_is_written(
        self, original: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
    ) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(convert, target, interrupted)
        source = original if target.startswith("import") else converted
        message = _refused(target.split("_")[0], source, tmp_path / "out", status=130)
        assert f"interrupted before anything of {tmp_path / 'out'} was written" in message

    @pytest.mark.parametrize("function", ["inspect_checkpoint", "HuggingFaceReader"])
    def test_of_a_command_that_writes_nothing(
        self, original: Path, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(inspect, function, interrupted)
        assert _refused("inspect", original, status=130) == "megatron-fp32: interrupted\n"

    def test_while_it_prints(self, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(inspect_text, "print_inspection", interrupted)
        assert _refused("inspect", original, status=130) == "megatron-fp32: interrupted\n"

    def test_of_all_processes_while_workers_start(self, original: Path, tmp_path: Path) -> None:
        """As a terminal does it: the signal goes to all of them, also to those that still import torch."""
        hf = Path(shutil.copytree(original, tmp_path / "hf"))
        import_checkpoint(hf, tmp_path / "megatron")
        command = ["export", str(tmp_path / "megatron"), str(tmp_path / "out"), "--workers", "2"]
        command += ["--max-shard-bytes", "4000"]
        job = tmp_path / ".out.partial" / "job.json"
        status, stderr = _interrupt(command, when=lambda _: job.is_file(), after=0.3)
        assert status == 130
        assert "Traceback" not in stderr
        assert "run the same command again" in stderr
        assert _run(*command).exit_code == 0
        assert not (tmp_path / ".out.partial").exists()

    def test_while_torch_is_imported(self, original: Path, tmp_path: Path) -> None:
        def is_importing(process: int) -> bool:
            return "libtorch" in Path(f"/proc/{process}/maps").read_text()

        status, stderr = _interrupt(["import", str(original), str(tmp_path / "out")], when=is_importing)
        assert status == 130
        assert stderr == (
            f"megatron-fp32: interrupted before anything of {tmp_path / 'out'} was written. Run the same command "
            "again to begin\n"
        )
        assert list(tmp_path.iterdir()) == []


def _interrupt(command: list[str], *, when: Callable[[int], bool], after: float = 0.0) -> tuple[int, str]:
    """Exit status and stderr of a command whose whole group of processes gets SIGINT, a while after a condition."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_fp32", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore the signal, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not when(process.pid):
        assert process.poll() is None, "it ended before it was interrupted"
        time.sleep(0.01)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


class TestMissingPackages:
    """In a process where the package cannot be imported."""

    @pytest.mark.parametrize(
        ("package", "modules", "remedies"),
        [
            ("megatron", 13, ("pip install 'megatron_fp32[megatron]'", "PYTHONPATH")),
            ("triton", 6, ("pip install triton",)),
        ],
    )
    def test_every_module(self, package: str, modules: int, remedies: tuple[str, ...]) -> None:
        """Each either works without it, or says how to install it. (megatron-core, too, may need Triton.)"""
        script = f"""
import importlib, pkgutil, megatron_fp32
from megatron_fp32.extras import MissingPackageError
missing = 0
for module in pkgutil.walk_packages(megatron_fp32.__path__, "megatron_fp32."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except MissingPackageError as error:
        if error.name.split(".")[0] == {package!r}:
            missing += 1
            assert all(remedy in str(error) for remedy in {remedies!r}), error
assert missing >= {modules}, missing
"""
        _without(package, script)

    def test_every_name_of_the_package(self) -> None:
        script = """
import megatron_fp32
from megatron_fp32.extras import MissingPackageError
failed = []
for name in megatron_fp32.__all__:
    try:
        getattr(megatron_fp32, name)
    except MissingPackageError as error:
        assert isinstance(error, ImportError)
        failed.append(name)
assert failed == [
    "Fp32GatedDeltaNet", "Fp32OutputLayer", "apply_fp32", "check_fp32", "install_optimizer_repairs",
    "logprobs_processor", "model_provider", "pre_wrap_hook", "to_fp32_output_layer",
], failed
from megatron_fp32.testing import cpu
for enter in (cpu.cpu_megatron, cpu.model_parallel):
    try:
        with enter():
            raise SystemExit("it worked")
    except MissingPackageError:
        pass
"""
        _without("megatron", script)

    def test_the_commands_do_not_need_it(self, original: Path, tmp_path: Path) -> None:
        script = "from megatron_fp32.cli import main; main()"
        _without("megatron", script, "import", str(original), str(tmp_path / "out"))
        assert (tmp_path / "out/release/.metadata").is_file()

    def test_another_error_inside_of_megatron_core_is_not_hidden(self) -> None:
        script = """
import sys, types
sys.modules["megatron.core.process_groups_config"] = None
try:
    import megatron_fp32.models.provider
except ImportError as error:
    assert "pip install" not in str(error), error
    assert "process_groups_config" in str(error), error
else:
    raise SystemExit("it worked")
"""
        _without("nothing", script)

    def test_transformer_engine(self, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """megatron-core without it calls None, or a name that is not there."""
        monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", None, raising=False)
        config = transformer_config(read_hf_config(original))
        for spec in (decoder_block_spec, mtp_block_spec):
            with pytest.raises(
                MissingPackageError, match=r"transformer_engine is not installed.*transformer_impl='local'"
            ):
                spec(config)

    def test_of_a_testing_helper(self) -> None:
        script = """
from megatron_fp32.extras import MissingPackageError
from megatron_fp32.testing.qwen3_5 import load_qwen3_5, write_qwen3_5
for function in (load_qwen3_5, write_qwen3_5):
    try:
        function("nowhere")
    except MissingPackageError as error:
        assert "pip install 'megatron_fp32[transformers]'" in str(error), error
    else:
        raise SystemExit("it worked")
"""
        _without("transformers", script)


def _without(package: str, script: str, *args: str) -> None:
    """Run a script where a package is not installed."""
    block = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + script, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
