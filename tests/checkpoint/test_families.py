"""Every family from Hugging Face to Megatron and back, without Megatron: bytes, names, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from tests.checkpoint.support import assets, stored_tensors
from tests.families import CASES, Case

Written = Callable[[Case], Path]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """`written(case)` is its checkpoint, written once. Do not change it."""
    made: dict[str, Path] = {}

    def of(case: Case) -> Path:
        if case.name not in made:
            made[case.name] = case.write(tmp_path_factory.mktemp("family") / "hf")
        return made[case.name]

    return of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_byte_comes_back(written: Written, tmp_path: Path, case: Case) -> None:
    hf = written(case)
    there = import_checkpoint(hf, tmp_path / "megatron", vision="carry" if case.outer else "refuse")
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    stored = stored_tensors(hf)
    assert stored_tensors(tmp_path / "hf") == stored
    assert assets(tmp_path / "hf") == assets(hf)
    assert report.unchanged == report.tensors == len(stored) == there.tensors + len(there.carried)
    assert (report.widened, report.rounded) == ((), ())
