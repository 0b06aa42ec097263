"""A checkpoint, its import, and copies of both for changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import Families
from tests.families import case


@pytest.fixture
def original(families: Families) -> Path:
    return families(case("Qwen3"))[0]


@pytest.fixture
def converted(families: Families) -> Path:
    return families(case("Qwen3"))[1]


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    """A copy, for changes."""
    return Path(shutil.copytree(original, tmp_path / "hf"))


@pytest.fixture
def megatron(converted: Path, tmp_path: Path) -> Path:
    """A copy, for changes."""
    return Path(shutil.copytree(converted, tmp_path / "megatron"))
