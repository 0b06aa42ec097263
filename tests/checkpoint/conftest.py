from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.support import altered, example_tensors, write_torch_dist
from tests.conftest import Families
from tests.families import case, unfuse


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A `torch_dist` checkpoint with tensors of several dtypes, an object and the common state."""
    return write_torch_dist(tmp_path / "checkpoint", example_tensors())


@pytest.fixture
def layouts(families: Families, tmp_path: Path) -> tuple[Path, Path]:
    """Fused experts, also of the MTP layer, and the same values with one tensor for each."""
    hf, _ = families(case("Qwen3.5-MoE"))
    return hf, altered(hf, tmp_path / "separate", unfuse)
