"""The Triton kernels of the operators without logits, in Triton's interpreter; tests/gpu has them on the GPU."""

from __future__ import annotations

import pytest

from tests.ops.interpreter import names_of, run_in_interpreter

KERNELS, OPERATORS = "tests.ops.interpreted_kernels", "tests.ops.interpreted_hostile_tokens"


@pytest.fixture(scope="module")
def kernels() -> dict[str, str]:
    return run_in_interpreter(KERNELS)


@pytest.fixture(scope="module")
def operators() -> dict[str, str]:
    return run_in_interpreter(OPERATORS)


@pytest.mark.parametrize("name", names_of(KERNELS))
def test_kernels_compute_what_their_definitions_do(kernels: dict[str, str], name: str) -> None:
    assert not kernels[name], kernels[name]


@pytest.mark.parametrize("name", names_of(OPERATORS))
def test_what_a_hostile_token_touches(operators: dict[str, str], name: str) -> None:
    assert not operators[name], operators[name]
