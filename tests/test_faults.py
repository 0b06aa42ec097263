"""The faults of `tests/faults` still apply to the package; `make mutants` runs them."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FAULTS = ROOT / "tests" / "faults"


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    # As `python tests/mutants.py` finds them.
    monkeypatch.syspath_prepend(FAULTS.parent)
    return importlib.import_module("faults").MUTANTS


def test_every_fault_applies_and_its_tests_exist(mutants: list[Any]) -> None:
    assert {m.name: m.problems(ROOT) for m in mutants if m.problems(ROOT)} == {}
    names = [mutant.name for mutant in mutants]
    assert len(names) == len(set(names))


def test_no_list_of_faults_is_forgotten(mutants: list[Any]) -> None:
    listed = {mutant.name for mutant in mutants}
    for path in FAULTS.glob("*.py"):
        module = importlib.import_module(f"faults.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, list) and path.stem != "__init__":
                assert {mutant.name for mutant in value} <= listed, path


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"old": "this text is nowhere"}, "in 0 places"),
        ({"old": "import"}, "places, expected one"),
        ({"file": "no/such.py"}, "there is no"),
        ({"new": "if ("}, "no Python"),
        ({"new": "if found != expected:  # the same"}, "the same program"),
        ({"test": "tests/no_such.py"}, r"there is no test tests/no_such\.py"),
        ({"test": "tests/test_faults.py tests/test_faults.py::no_such"}, "test_faults.py::no_such"),
        ({"test": "tests/checkpoint/test_convert.py::TestVerification::no_such"}, "TestVerification::no_such"),
    ],
)
def test_one_that_does_not_apply_is_found(mutants: list[Any], change: dict[str, str], problem: str) -> None:
    (good,) = (mutant for mutant in mutants if mutant.name == "believe the disk")
    assert good.problems(ROOT) == []
    (found,) = dataclasses.replace(good, **change).problems(ROOT)
    assert re.search(problem, found), found
