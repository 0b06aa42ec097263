"""`make dist` notices what is missing, and CI runs what the README says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_dist", ROOT / ".ci" / "dist.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_that_an_archive_lacks_or_should_not_have(dist: ModuleType) -> None:
    held = ["README.md", "PKG-INFO", "megatron_fp32.egg-info/SOURCES.txt", "notes.txt", "x.dist-info/RECORD"]
    assert dist.differences("the sdist", held, ["README.md", "tests/support.py"]) == [
        "the sdist lacks tests/support.py",
        "the sdist holds notes.txt, which is not tracked",
    ]


def test_a_wheel_holds_the_package_alone(dist: ModuleType) -> None:
    tracked = ["megatron_fp32/__init__.py", "megatron_fp32/py.typed", "tests/__init__.py", "setup.py"]
    assert dist.of_package(tracked) == tracked[:2]


def test_the_commands_are_read_from_the_help(dist: ModuleType, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text(
        "#!/bin/sh\nprintf 'Usage: tool\\n\\n  Text.\\n\\nCommands:\\n  export   Write.\\n  two-words  X.\\n'\n"
    )
    tool.chmod(0o755)
    assert dist.commands(tool) == ["export", "two-words"]


def test_a_command_that_fails_ends_the_script_with_what_it_said(dist: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"failed:\nhere is why"):
        dist.command(sys.executable, "-c", "print('here is why'); raise SystemExit(1)")


def test_the_sdist_takes_every_tracked_file_from_a_tree(dist: ModuleType, tmp_path: Path) -> None:
    """A small tree with this MANIFEST.in, whose helper nobody imports."""
    tree = tmp_path / "tree"
    files = {
        "MANIFEST.in": (ROOT / "MANIFEST.in").read_text(),
        "pyproject.toml": "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        "[project]\nname = 'megatron_fp32'\nversion = '1.2'\nlicense-files = ['LICENSE']\n"
        "[tool.setuptools]\npackages = ['megatron_fp32']\n",
        **dict.fromkeys(("LICENSE", "Makefile", "README.md", ".gitignore", ".ci/run", "locks/a.txt"), ""),
        **dict.fromkeys(("megatron_fp32/__init__.py", "tests/helper.py", "docs/figure.svg", "examples/a/b.py"), ""),
        "benchmarks/results/x.json": "{}",
        "setup.py": "from setuptools import setup\n\nsetup()\n",
    }
    for name, text in {**files, "tests/__pycache__/helper.cpython-312.pyc": ""}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    archive = dist.build("sdist", tree, tmp_path / "out")
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(tmp_path)], check=True)
    assert dist.differences("the sdist", dist.files_below(tmp_path / "megatron_fp32-1.2"), files) == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = re.findall(r"^step make (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert set(commands) == {"lint", "check", "docs", "dist", "smoke", "test"}
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)
