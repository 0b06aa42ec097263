"""Every code block of the README and the docs runs, in the order of its file."""

from __future__ import annotations

import ast
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

from megatron_fp32.check import check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.models.provider import cpu_overrides
from megatron_fp32.testing.qwen3_5 import write_qwen3_5
from megatron_fp32.testing.training import Batch, Trainer
from tests import recipe_stubs

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")])
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    yield from BLOCK.findall(page.read_text())


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name != "quickstart.md":
        write_qwen3_5("qwen3_5")
    if page.name in ("checkpoints.md", "fp8.md"):
        shell("megatron-fp32 import qwen3_5 checkpoint")
    names: dict[str, Any] = {"parallel_settings": {**cpu_overrides(), "params_dtype": torch.bfloat16}}
    if page.name == "recipes.md":
        names |= recipe_stubs.names()
        for name, module in recipe_stubs.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    ran = 0
    for language, code in blocks(page):
        assert language in ("python", "bash", "console", "text"), language
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif language == "bash":
            shell(code)
        ran += language in ("python", "bash")
    assert ran or page.name in ("numerics.md", "refused.md", "scale.md")
    if page.name == "recipes.md":
        recipes_did_what_they_say(names)
    if "repairs" in names:
        names["repairs"].undo()


def recipes_did_what_they_say(names: dict[str, Any]) -> None:
    """Every recipe's model is in fp32, and its weights arrived in fp32 parameters."""
    fp32 = names["fp32"]
    assert names["from_flags"] == Fp32Config(grad_precision="bf16x2")
    for chunks in (names["model"], names["state"]):
        check_fp32(chunks, fp32)
    assert names["provider"].loaded_into == [torch.float32]
    (hook,) = names["model_config"].pre_wrap_hooks
    check_fp32(recipe_stubs.wrapped([hook]), fp32)
    for provider in ("model_provider", "slime_model_provider"):
        check_fp32(names[provider](True, True, vp_stage=None), fp32)
    engine = recipe_stubs.EngineRegistry._engines["language_model"]["megatron"]["cuda"]()
    engine._build_tf_config()
    check_fp32(engine._build_megatron_module(), fp32)
    assert engine.provider.loaded_into == [torch.float32]
    trainer = Trainer(names["model_provider"]())
    trainer.step([Batch.random(120, batch=2, length=16)])
    names["after_the_first_step"]([trainer.model], trainer.optimizer)


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        t for page in [*PAGES, ROOT / "CONTRIBUTING.md"] for t in re.findall(r"\bmake ([a-z-]+)", page.read_text())
    }
    assert {"demo", "test", "test-gpu", "mutants"} <= named <= targets


def test_links_between_files_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def shell(script: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", script], check=True, env={**os.environ, "PATH": path})


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
