"""A checkpoint, its import, and copies of both for changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_fp32.checkpoint.convert import import_checkpoint
from tests.families import case


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
