"""The Triton kernels of `linear_distillation`, in Triton's interpreter; tests/gpu has them on the GPU."""

from __future__ import annotations

import pytest

from tests.ops.interpreter import names_of, run_in_interpreter

KERNELS = "tests.ops.interpreted_distillation"


@pytest.fixture(scope="module")
def kernels() -> dict[str, str]:
    return run_in_interpreter(KERNELS)


@pytest.mark.parametrize("name", names_of(KERNELS))
def test_kernels_compute_what_their_definitions_do(kernels: dict[str, str], name: str) -> None:
    assert not kernels[name], kernels[name]
