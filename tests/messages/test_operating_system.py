"""What users see when the operating system refuses something, or when they interrupt a command."""

from __future__ import annotations

import errno
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

from megatron_fp32.checkpoint import convert, inspect
from megatron_fp32.checkpoint.convert import import_checkpoint
from megatron_fp32.checkpoint.formats.torch_dist_writer import DataFile
from megatron_fp32.cli import inspect_text
from tests.support import refused, run_command

ROOT = Path(__file__).parents[2]


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
        message = refused("import", original, tmp_path / "out")
        partial = tmp_path / ".out.partial"
        assert f"{partial}: {os.strerror(number)}. What to do: " in message
        assert remedy in message
        assert f"What is finished stays in {partial}: run the same command again" in message
        with pytest.raises(OSError, match=r"out\.partial") as caught:
            import_checkpoint(original, tmp_path / "out")
        assert (caught.value.errno, caught.value.filename) == (number, str(partial))
        monkeypatch.undo()
        assert run_command("import", original, tmp_path / "out").exit_code == 0

    def test_an_error_that_names_a_file_keeps_it(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def denied(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "/some/file")

        monkeypatch.setattr(DataFile, "write", denied)
        message = refused("import", original, tmp_path / "out")
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
        message = refused("import", original, tmp_path / "out", status=130)
        partial = tmp_path / ".out.partial"
        assert f"interrupted. What is finished stays in {partial}: run the same command again to go on" in message
        monkeypatch.undo()
        assert run_command("import", original, tmp_path / "out").exit_code == 0

    @pytest.mark.parametrize("target", ["import_checkpoint", "export_checkpoint"])
    def test_before_anything_is_written(
        self, original: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
    ) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(convert, target, interrupted)
        source = original if target.startswith("import") else converted
        message = refused(target.split("_")[0], source, tmp_path / "out", status=130)
        assert f"interrupted before anything of {tmp_path / 'out'} was written" in message

    @pytest.mark.parametrize("function", ["inspect_checkpoint", "HuggingFaceReader"])
    def test_of_a_command_that_writes_nothing(
        self, original: Path, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(inspect, function, interrupted)
        assert refused("inspect", original, status=130) == "megatron-fp32: interrupted\n"

    def test_while_it_prints(self, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(inspect_text, "print_inspection", interrupted)
        assert refused("inspect", original, status=130) == "megatron-fp32: interrupted\n"

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
        assert run_command(*command).exit_code == 0
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
