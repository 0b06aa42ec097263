from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_fp32.checkpoint.convert import import_checkpoint
from tests.checkpoint.support import altered, example_tensors, write_torch_dist
from tests.families import Case, case, unfuse
from tests.qwen3_5 import write_small

Source = Callable[..., Path]
Families = Callable[[Case], tuple[Path, Path]]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """`source(**fields)` is a Hugging Face checkpoint, written once for the whole run. Do not change it."""
    written: dict[str, Path] = {}

    def of(**fields: Any) -> Path:
        key = repr(sorted(fields.items()))
        if key not in written:
            written[key] = write_small(tmp_path_factory.mktemp("source") / "hf", **fields)
        return written[key]

    return of


@pytest.fixture(scope="session")
def imported(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """`imported(**fields)` is what an import made of `source(**fields)`. Do not change it."""
    made: dict[str, Path] = {}

    def of(**fields: Any) -> Path:
        key = repr(sorted(fields.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("imported") / "megatron"
            import_checkpoint(source(**fields), made[key])
        return made[key]

    return of


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """A case's Hugging Face checkpoint and what an import made of it, once for the whole run. Do not change them."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(case: Case) -> tuple[Path, Path]:
        if case.name not in made:
            root = tmp_path_factory.mktemp("family")
            hf = case.write(root / "hf")
            import_checkpoint(hf, root / "megatron", vision="carry" if case.outer else "refuse")
            made[case.name] = (hf, root / "megatron")
        return made[case.name]

    return of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A `torch_dist` checkpoint with tensors of several dtypes, an object and the common state."""
    return write_torch_dist(tmp_path / "checkpoint", example_tensors())


@pytest.fixture
def layouts(families: Families, tmp_path: Path) -> tuple[Path, Path]:
    """Fused experts, also of the MTP layer, and the same values with one tensor for each."""
    hf, _ = families(case("Qwen3.5-MoE"))
    return hf, altered(hf, tmp_path / "separate", unfuse)
