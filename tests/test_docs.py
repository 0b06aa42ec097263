"""Every code block of the README and the docs runs as it stands, with nothing but what the page gives it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")])
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITHOUT_BLOCKS = {
    "api",
    "benchmark-history",
    "glossary",
    "how-it-works",
    "index",
    "limits",
    "new-megatron-core",
    "scale",
    "troubleshooting",
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


SHOWN_FILE = re.compile(r"^<!-- examples/\S+ -->\n```python\n.*?^```\n", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, code) of every block, without those that show a file: tests/test_recipes.py runs these files."""
    text = SHOWN_FILE.sub("", page.read_text())
    found = BLOCK.findall(text)
    assert text.count("```") == 2 * len(found), f"{page.name}: a block is indented, or names no language"
    yield from found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs_as_it_stands(page: Path, tmp_path: Path) -> None:
    """The page begins in an empty directory, and a Python block is a script of its own."""
    ran = 0
    for language, code in blocks(page):
        assert language in ("python", "bash", "console", "text"), language
        if language == "python":
            script(code, tmp_path)
        elif language == "bash":
            shell(code, tmp_path)
        ran += language in ("python", "bash")
    assert ran or page.stem in WITHOUT_BLOCKS


@pytest.mark.parametrize("code", ["print(model)", "import math\nprint(torch.pi)", "open('qwen3_5/config.json')"])
def test_a_block_that_needs_more_than_it_says_fails(code: str, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        script(code, tmp_path)


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        t for page in [*PAGES, ROOT / "CONTRIBUTING.md"] for t in re.findall(r"\bmake ([a-z-]+)", page.read_text())
    }
    assert {"demo", "test", "test-gpu", "mutants"} <= named <= targets


MAPS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "design").glob("*.md"))]
TO_WRITE = {"megatron_fp32/weights/families/mistral.py"}
"""What a reader of a page is to write."""


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.name)
def test_modules_that_a_page_for_contributors_names_exist(page: Path) -> None:
    """By their path from the root or from the package."""
    named = set(re.findall(r"(?:\w+/)+\w+\.py\b", page.read_text())) - TO_WRITE
    assert [
        name for name in named if not any((place / name).exists() for place in (ROOT, ROOT / "megatron_fp32"))
    ] == []


def test_index_lists_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)#]+\.md)", (ROOT / "docs" / "index.md").read_text()))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert pages - {"index.md"} == linked - {"../CONTRIBUTING.md"}


MESSAGES = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_troubleshooting_quotes_messages_of_the_code(message: str) -> None:
    """`...` on the page stands for whatever the code puts there."""
    assert any(says(text, message) for text in texts_of_the_package())


@pytest.mark.parametrize("message", ["holds parts of another job", "...", "exists already: name it"])
def test_a_message_that_the_code_does_not_have_is_found(message: str) -> None:
    assert not any(says(text, message) for text in texts_of_the_package())


def says(text: str, message: str) -> bool:
    """Whether the parts of a message are in a text, in their order."""
    parts = [part.strip() for part in message.split("...") if part.strip()]
    return bool(parts) and re.search(".*".join(map(re.escape, parts)), text, re.DOTALL) is not None


@functools.cache
def texts_of_the_package() -> list[str]:
    """Every string of the package that is no docstring; what an f-string puts in is left out."""
    found = []
    for file in (ROOT / "megatron_fp32").rglob("*.py"):
        tree = ast.parse(file.read_text())
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                pieces = [piece.value if isinstance(piece, ast.Constant) else "" for piece in node.values]
                found.append("".join(map(str, pieces)))
    return found


def shell(commands: str, directory: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", commands], check=True, cwd=directory, env=environment() | {"PATH": path})


def script(code: str, directory: Path) -> None:
    file = directory / "block.py"
    file.write_text(code)
    subprocess.run([sys.executable, file.name], check=True, cwd=directory, env=environment())


def environment() -> dict[str, str]:
    """Of a user who has installed the package of this tree, and who uses no GPU, as the pages say."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_names_that_exist(script: Path) -> None:
    """Those that need a GPU or an hour run in no test."""
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module or "", alias.name) for node in imports for alias in node.names]
    ours = [(module, name) for module, name in ours if module.startswith("megatron_fp32")]
    assert [f"{module}.{name}" for module, name in ours if not exists(module, name)] == []


def exists(module: str, name: str) -> bool:
    """Whether `from module import name` works; where Triton is not installed, its modules are believed."""
    try:
        return (
            hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None
        )
    except ModuleNotFoundError as error:
        return error.name == "triton"
