"""Messages name arguments in Python and flags on the command line, and never mix both."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import megatron_fp32
from megatron_fp32 import (
    cli,
    export_checkpoint,
    import_checkpoint,
    inspect_checkpoint,
    quantize_checkpoint,
    verify_checkpoints,
)
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.formats.torch_dist_writer import TorchDistWriter
from megatron_fp32.cli.flags import all_options, with_flags
from tests.families import case
from tests.qwen3_5 import write_small

ROOT = Path(megatron_fp32.__file__).parent
FUNCTIONS = (import_checkpoint, export_checkpoint, quantize_checkpoint, verify_checkpoints, inspect_checkpoint)
OPTIONS = all_options(cli.main)
FLAGS = {flag for option in OPTIONS.values() for flag in option.opts}
ARGUMENTS = {name for function in FUNCTIONS for name in inspect.signature(function).parameters}

FLAG = re.compile(r"--[a-z][a-z0-9-]*")
ARGUMENT = re.compile(rf"(?<![\w.=/-])({'|'.join(sorted(ARGUMENTS))})=")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("vision='carry' keeps them", "--vision carry keeps them"),
        ('pass dtype="source", or not', "pass --dtype source, or not"),
        ("text_only=True drops them", "--text-only drops them"),
        ("pass it as source=DIR.", "pass it as --source DIR."),
        ("vocab_size=57 compares", "--vocab-size 57 compares"),
        ("vocab_size must be at least 5", "--vocab-size must be at least 5"),
        ("a/b: workers must be 1", "a/b: --workers must be 1"),
        ("the source must be read, vocab_size in config.json, dtypes=3", None),
        ("/data/source=v1/x and run-mtp=2 and my.dtype=a", None),
        ("progress must be a function", None),
    ],
)
def test_what_becomes_a_flag(message: str, expected: str | None) -> None:
    assert with_flags(message, OPTIONS) == (message if expected is None else expected)


def test_a_name_has_one_flag_in_all_commands() -> None:
    for command in cli.main.commands.values():
        for param in command.params:
            if param.name in OPTIONS and param.param_type_name == "option":
                assert param.opts == OPTIONS[param.name].opts, (command.name, param.name)


def test_every_option_that_is_an_argument_has_its_name() -> None:
    """So the translation finds it: `--max-part-bytes` is `max_part_bytes`."""
    for name, option in OPTIONS.items():
        if name in ARGUMENTS:
            assert option.opts[0] == f"--{name.replace('_', '-')}"
    only_here = {"as_json", "values_only", "limit", "plot", "tensors", "match", "like", "fp8_like"}
    assert OPTIONS.keys() - ARGUMENTS == only_here


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a module that are not docstrings; `X` stands for what an f-string puts in."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inner:
            yield node.lineno, node.value


MODULES = sorted(path for room in ("checkpoint", "weights") for path in (ROOT / room).rglob("*.py"))

COMMAND_LINES = ("hf download ", "export X FP8_DIR --fp8 X")
"""Texts with whole command lines."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_of_the_package_names_a_flag(path: Path) -> None:
    found = [
        (line, text)
        for line, text in _texts(path)
        if FLAGS & set(FLAG.findall(text)) and not any(command in text for command in COMMAND_LINES)
    ]
    assert found == []


def test_every_argument_that_a_message_names_becomes_a_flag() -> None:
    named = [text for path in MODULES for _, text in _texts(path) if ARGUMENT.search(text)]
    # Not all of them are meant for users of the commands: these are arguments that no option passes on.
    assert {found for text in named for found in ARGUMENT.findall(with_flags(text, OPTIONS))} == set()
    assert {found for text in named for found in ARGUMENT.findall(text)} >= {
        *("vision", "mtp", "text_only", "source", "allow_rounded", "vocab_size")
    }


class TestBothWays:
    """One fault, told by the function and by the command."""

    @pytest.fixture(scope="class")
    def checkpoints(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """hf, vl (with vision), megatron, elsewhere (without its sidecar), and rounded (all bf16)."""
        root = tmp_path_factory.mktemp("flags")
        write_small(root / "hf")
        write_small(root / "vl", released_names=True)
        import_checkpoint(root / "hf", root / "megatron")
        shutil.copytree(root / "megatron" / "release", root / "elsewhere")
        reader = TorchDistReader(root / "megatron")
        (root / "rounded").mkdir()
        with TorchDistWriter(root / "rounded") as writer:
            for name in reader.tensors:
                writer.write(name, reader.read(name).bfloat16())
            writer.finish({})
        return root

    @pytest.mark.parametrize(
        ("function", "command", "in_python", "on_the_command_line"),
        [
            (
                lambda at: import_checkpoint(at / "vl", at / "out"),
                "import vl out",
                ["vision='carry'", "vision='drop'", "text_only=True"],
                ["--vision carry", "--vision drop", "--text-only"],
            ),
            (
                lambda at: import_checkpoint(at / "hf", at / "out", text_only=True, mtp="carry"),
                "import hf out --text-only --mtp carry",
                ["text_only=True", "vision='refuse'", "mtp='carry'"],
                ["--text-only", "--vision refuse", "--mtp carry"],
            ),
            (
                lambda at: export_checkpoint(at / "elsewhere", at / "out"),
                "export elsewhere out",
                ["source=DIR"],
                ["--source DIR"],
            ),
            (
                lambda at: export_checkpoint(at / "rounded", at / "out", source=at / "megatron"),
                "export rounded out --source megatron",
                ["allow_rounded=True"],
                ["--allow-rounded"],
            ),
            (
                lambda at: export_checkpoint(at / "megatron", at / "out", vocab_size=5),
                "export megatron out --vocab-size 5",
                ["vocab_size must be at least"],
                ["--vocab-size must be at least"],
            ),
            (
                lambda at: verify_checkpoints(at / "hf", at / "hf", source=at / "megatron"),
                "verify hf hf --source megatron",
                ["source must be left out"],
                ["--source must be left out"],
            ),
            (
                lambda at: verify_checkpoints(at / "hf", at / "hf", vocab_size=57),
                "verify hf hf --vocab-size 57",
                ["vocab_size must be left out"],
                ["--vocab-size must be left out"],
            ),
            (
                lambda at: inspect_checkpoint(at / "hf", source=at / "megatron"),
                "inspect hf --source megatron",
                ["source must be left out"],
                ["--source must be left out"],
            ),
            (
                lambda at: quantize_checkpoint(at / "hf", at / "out", "blockwise", device="abacus"),
                "quantize hf out --scheme blockwise --device abacus",
                ["device must be"],
                ["--device must be"],
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_message(
        self,
        checkpoints: Path,
        monkeypatch: pytest.MonkeyPatch,
        function: Callable[[Path], object],
        command: str,
        in_python: list[str],
        on_the_command_line: list[str],
    ) -> None:
        monkeypatch.chdir(checkpoints)
        with pytest.raises(ValueError, match=in_python[0]) as caught:
            function(checkpoints)
        message = str(caught.value)
        assert [text for text in in_python if text not in message] == []
        assert FLAG.findall(message) == []
        result = CliRunner().invoke(cli.main, command.split())
        assert result.exit_code == (2 if command.startswith(("verify", "inspect")) else 1)
        assert [text for text in on_the_command_line if text not in result.stderr] == []
        assert ARGUMENT.findall(result.stderr) == []

    def test_a_model_that_was_trained_without_its_mtp_layer(self, tmp_path: Path) -> None:
        hf = case("Qwen3.5").write(tmp_path / "hf")
        import_checkpoint(hf, tmp_path / "megatron")
        reader = TorchDistReader(tmp_path / "megatron")
        (tmp_path / "trained").mkdir()
        with TorchDistWriter(tmp_path / "trained") as writer:
            for name in reader.tensors:
                if not name.startswith("mtp."):
                    writer.write(name, reader.read(name))
            writer.finish({})
        args = ["export", str(tmp_path / "trained"), str(tmp_path / "out"), "--source", str(tmp_path / "megatron")]
        result = CliRunner().invoke(cli.main, args)
        assert result.exit_code == 1
        assert "with --mtp carry or --mtp drop, and pass the result as --source DIR" in result.stderr

    def test_a_note_of_a_comparison(self, tmp_path: Path) -> None:
        hf = case("Qwen3").write(tmp_path / "hf")
        import_checkpoint(hf, tmp_path / "megatron")
        reader = TorchDistReader(tmp_path / "megatron")
        (tmp_path / "trained").mkdir()
        with TorchDistWriter(tmp_path / "trained") as writer:
            for name in reader.tensors:
                tensor = reader.read(name)
                if "word_embeddings" in name:
                    tensor = torch.cat([tensor, torch.ones_like(tensor[:3])])
                writer.write(name, tensor)
            writer.finish({})
        args = ["verify", str(hf), str(tmp_path / "trained"), "--source", str(tmp_path / "megatron")]
        result = CliRunner().invoke(cli.main, args)
        text = " ".join(result.stdout.split())
        rows = TorchDistReader(tmp_path / "megatron").tensors["embedding.word_embeddings.weight"].shape[0]
        assert (
            f"are all equal, as padding rows are after training. Pass --vocab-size {rows} to compare without them"
            in text
        )
        assert "vocab_size=" not in text
