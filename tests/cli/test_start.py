"""Help, version and completion answer at once: nothing large is imported for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("import", "export", "quantize", "verify", "inspect")

LARGE = {"torch", "numpy", "megatron.core", "triton", "transformers", "huggingface_hub", "matplotlib", "safetensors"}

SCRIPT = """
import sys
from megatron_fp32.__main__ import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def _start(directory: Path, *args: str, **environment: str) -> tuple[str, set[str], int]:
    """What is printed, the modules that were imported for it, and the exit status."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout, set(done.stderr.splitlines()[-1].split()), done.returncode


@pytest.mark.parametrize(
    "args",
    [("--help",), ("-h",), ("--version",), *((command, "--help") for command in COMMANDS)],
    ids=" ".join,
)
def test_help_and_version(tmp_path: Path, args: tuple[str, ...]) -> None:
    printed, modules, status = _start(tmp_path, *args)
    assert status == 0
    assert printed.startswith("megatron-fp32, version" if args == ("--version",) else "Usage: megatron-fp32 ")
    assert modules & LARGE == set()


@pytest.mark.parametrize("args", [("import",), ("import", "no/such/directory", "out"), ("quantize", ".", "x", "--fp8")])
def test_mistakes_on_the_command_line(tmp_path: Path, args: tuple[str, ...]) -> None:
    printed, modules, status = _start(tmp_path, *args)
    assert (status, printed) == (2, "")
    assert modules & LARGE == set()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("megatron-fp32 ", set(COMMANDS)),
        ("megatron-fp32 import --vision ", {"refuse", "carry", "drop"}),
        ("megatron-fp32 import --mtp ", {"convert", "carry", "drop"}),
        ("megatron-fp32 export --fp8 ", {"blockwise", "channelwise", "modelopt"}),
        ("megatron-fp32 export --dtype ", {"trained", "source"}),
    ],
)
def test_completion(tmp_path: Path, words: str, offered: set[str]) -> None:
    printed, modules, status = _start(
        tmp_path,
        _MEGATRON_FP32_COMPLETE="bash_complete",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split())),
    )
    assert status == 0
    assert {line.removeprefix("plain,") for line in printed.splitlines()} == offered
    assert modules & LARGE == set()


def test_the_script_that_a_shell_reads(tmp_path: Path) -> None:
    printed, modules, _ = _start(tmp_path, _MEGATRON_FP32_COMPLETE="zsh_source")
    assert "#compdef megatron-fp32" in printed
    assert modules & LARGE == set()


def test_python_dash_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fp32", "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("megatron-fp32, version ")


def test_what_is_large_is_seen(tmp_path: Path) -> None:
    """A command that reads a checkpoint does import torch."""
    _, modules, status = _start(tmp_path, "inspect", ".")
    assert status == 2
    assert "torch" in modules
