"""Splitting an fp32 tensor into 16-bit pieces: what they hold, and the Triton kernel against the definition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_fp32.ops.products.split import split, split_scale, split_torch

BITS = {torch.bfloat16: 8, torch.float16: 11}
ROOT = Path(__file__).parents[2]


def joined(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """What the pieces hold, in float64."""
    pieces = split(x, count, dtype, scale=split_scale(x, count, dtype))
    total = sum(part.double() for part in pieces.parts)
    return total if pieces.inverse_scale is None else total * pieces.inverse_scale.double()


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("magnitude", [1e-9, 1.0, 3e4])
def test_pieces_hold_their_bits(dtype: torch.dtype, count: int, magnitude: float) -> None:
    x = torch.randn(64, 100) * magnitude
    error = (joined(x, count, dtype) - x.double()).abs()
    held = min(24, BITS[dtype] * count)
    # Values far below the largest one run out of float16's range.
    near = x.abs() > x.abs().max() * 2.0**-6
    assert (error <= x.double().abs() * 2.0**-held)[near].all()
    if dtype == torch.bfloat16 and count == 3:
        assert not error.any()


def test_one_piece_is_the_rounded_tensor() -> None:
    x = torch.randn(5, 7)
    (only,), inverse = split(x, 1, torch.float16)
    assert torch.equal(only, x.half())
    assert inverse is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_has_the_dtype_already_is_not_split(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype)
    (only,), inverse = split(x, 3, dtype)
    assert only is x
    assert inverse is None


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@settings(deadline=None, max_examples=200)
def test_float16_pieces_never_overflow(values: list[float]) -> None:
    x = torch.tensor([values])
    pieces = split(x, 2, torch.float16, scale=split_scale(x, 2, torch.float16))
    assert all(part.isfinite().all() for part in pieces.parts)
    assert torch.frexp(pieces.inverse_scale)[0] == 0.5  # a power of two
    largest = x.double().abs().max()
    if largest > 2.0**-126:
        assert (joined(x, 2, torch.float16) - x.double()).abs().max() <= largest * 2.0**-21


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", BITS)
def test_a_value_that_is_not_finite_stays_what_it_is(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, value, 2.5]])
    for part in split(x, 3, dtype, scale=split_scale(x, 3, dtype)).parts[1:]:
        assert not part[0, 1]
    assert torch.equal(joined(x, 3, dtype), x.double()) or value != value
    assert joined(x, 3, dtype)[0, 2] == 2.5


def test_zeros_and_nothing() -> None:
    for shape in ((2, 3), (0, 3)):
        x = torch.zeros(shape)
        assert not joined(x, 2, torch.float16).any()
        assert split_scale(x, 2, torch.float16) == 1


INTERPRETED = """
import torch
from megatron_fp32.ops.products.split import split_scale, split_torch
from megatron_fp32.ops.products.split_triton import split_triton

torch.manual_seed(0)
wide = torch.randn(3, 10000) * torch.logspace(-30, 30, 10000)
wide[0, :6] = torch.tensor([0.0, -0.0, 3e38, -3.4e38, 1e-40, 2.0**-133])
special = wide.clone()
special[1, 5:8] = torch.tensor([float("inf"), float("-inf"), float("nan")])
for x in (wide, special, wide[:, 17:5000], wide.t().contiguous().t(), wide[:, :1], wide[:0], wide[:, ::2]):
    for dtype in (torch.bfloat16, torch.float16):
        for count in (2, 3):
            scale = split_scale(x, count, dtype)
            ours, theirs = split_triton(x, count, dtype, scale), split_torch(x, count, dtype, scale)
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == b.dtype == dtype and a.shape == b.shape == x.shape
                if dtype == torch.bfloat16:
                    continue
                # NaN has many bit patterns.
                same = (a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())
                assert same.all(), (dtype, count, x.shape, a[~same], b[~same])
            if dtype == torch.bfloat16 and x.numel() and x.isfinite().all():
                # The interpreter truncates to bfloat16 where the GPU rounds, and errs in denormals: other pieces.
                error = (sum(p.double() for p in ours) - x.double()).abs()
                assert (error <= x.double().abs() * 2.0 ** (1 - 7 * count))[x.abs() > 2.0**-100].all()
print("right")
"""


def test_the_triton_kernel_splits_as_defined() -> None:
    """In Triton's interpreter, which must be chosen before the kernel is imported."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "right\n", run.stderr


def test_the_definition_rounds_to_nearest() -> None:
    (hi, lo) = split_torch(torch.tensor([[1.0 + 2**-8 + 2**-15]]), 2, torch.bfloat16, None)
    assert hi == 1.0 + 2**-7
    assert lo.double() == 2**-15 - 2**-8
