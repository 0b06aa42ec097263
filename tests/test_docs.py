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
from typing import Any

import pytest
import torch

from megatron_fp32 import install_optimizer_repairs
from megatron_fp32.check import check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.testing.training import Batch, Trainer
from tests import recipe_stubs

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")])
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = ROOT / "docs" / "recipes.md"
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


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    text = page.read_text()
    found = BLOCK.findall(text)
    assert text.count("```") == 2 * len(found), f"{page.name}: a block is indented, or names no language"
    yield from found


@pytest.mark.parametrize("page", [page for page in PAGES if page != RECIPES], ids=lambda page: page.name)
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


@pytest.fixture
def optimizer_repairs() -> Iterator[None]:
    """Installed already, and taken back afterwards: recipes install them for the rest of the process."""
    with install_optimizer_repairs():
        yield


@pytest.mark.usefixtures("megatron", "optimizer_repairs")
def test_every_recipe_does_what_it_says(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Each by itself, beside stubs of the program that it is for."""
    for name, module in recipe_stubs.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    found: list[dict[str, Any]] = []
    for language, code in blocks(RECIPES):
        assert language == "python"
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(code, str(RECIPES), "exec"), names)
        if "repairs" in names:
            request.addfinalizer(names["repairs"].undo)
        found.append(names)

    def defined(name: str) -> list[Any]:
        return [names[name] for names in found if name in names]

    (fp32,) = defined("fp32")
    assert fp32 == Fp32Config()
    assert defined("from_flags") == [Fp32Config(grad_precision="bf16x2")]
    megatron_lm, slime = defined("model_provider")
    for provider in (megatron_lm, slime):
        check_fp32(provider(True, True, vp_stage=None), fp32)
    (model_config,) = defined("fp32_model_config")
    (hook,) = model_config(recipe_stubs.get_args()).pre_wrap_hooks
    check_fp32(recipe_stubs.wrapped([hook]), fp32)
    (bridge,), (nemo_rl,) = defined("fp32_model"), defined("fp32_setup")
    check_fp32(bridge(recipe_stubs.Bridge(), None), fp32)
    assert recipe_stubs.Bridge.provider.loaded_into == [torch.float32]
    check_fp32(nemo_rl(None, None), fp32)
    engine = recipe_stubs.EngineRegistry._engines["language_model"]["megatron"]["cuda"]()
    engine._build_tf_config()
    check_fp32(engine._build_megatron_module(), fp32)
    assert engine.provider.loaded_into == [torch.float32]
    trainer = Trainer(megatron_lm())
    trainer.step([Batch.random(120, batch=2, length=16)])
    (after_the_first_step,) = defined("after_the_first_step")
    after_the_first_step([trainer.model], trainer.optimizer)


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        t for page in [*PAGES, ROOT / "CONTRIBUTING.md"] for t in re.findall(r"\bmake ([a-z-]+)", page.read_text())
    }
    assert {"demo", "test", "test-gpu", "mutants"} <= named <= targets


def test_links_between_files_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


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
