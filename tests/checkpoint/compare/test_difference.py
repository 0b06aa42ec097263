"""Differences of tensors beside numpy's, one value after another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fp32.checkpoint.compare import difference
from megatron_fp32.checkpoint.compare.difference import Comparison, ValueDifference

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@pytest.fixture(autouse=True, params=[1 << 20, 7], ids=["one chunk", "chunks of 7"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "_CHUNK", request.param)


def _compare(a: Tensor, b: Tensor) -> ValueDifference:
    comparison = Comparison(tuple(a.shape))
    comparison.add(a, b)
    return comparison.result()


def _values(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).mul(3).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def _bytes(tensor: Tensor) -> list[bytes]:
    size = tensor.dtype.itemsize
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def _expected(a: Tensor, b: Tensor) -> Iterator[tuple[float, float, tuple[int, ...], float, float]]:
    """For tensors of one dtype: absolute, relative, place, a, b of every pair whose bytes differ."""
    floats = [[float(v) for v in t.contiguous().view(-1).double()] for t in (a, b)]
    places = itertools.product(*map(range, a.shape))
    for place, x, y, x_bytes, y_bytes in zip(places, *floats, _bytes(a), _bytes(b), strict=True):
        if x_bytes != y_bytes:
            size = abs(x - y)
            yield size, size / max(abs(x), abs(y)) if x or y else 0.0, place, x, y


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_count_sizes_and_places_are_those_of_a_loop_over_values(dtype: torch.dtype) -> None:
    a, b = _values(dtype, 5, 3, 4), _values(dtype, 5, 3, 4)
    other = _values(dtype, 5, 3, 4, seed=1)
    changed = torch.rand(5, 3, 4) < 0.4
    b.view(-1)[changed.view(-1)] = other.view(-1)[changed.view(-1)]
    found, expected = _compare(a, b), list(_expected(a, b))
    assert 5 < len(expected) < 40
    assert (found.count, found.total) == (len(expected), 60)
    assert found.first == expected[0][2]
    for largest, sizes in ((found.absolute, [e[0] for e in expected]), (found.relative, [e[1] for e in expected])):
        assert largest is not None
        first = sizes.index(max(sizes))
        assert largest.size == pytest.approx(sizes[first], rel=1e-15)
        assert (largest.index, largest.a, largest.b) == expected[first][2:]


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_equal_tensors_do_not_differ(dtype: torch.dtype) -> None:
    a = _values(dtype, 9, 2)
    found = _compare(a, a.clone())
    assert (found.count, found.first, found.absolute, found.relative) == (0, None, None, None)


def test_one_flipped_bit_is_one_value() -> None:
    a = _values(torch.bfloat16, 33)
    b = a.clone()
    b.view(torch.int16)[20] ^= 1
    found = _compare(a, b)
    assert (found.count, found.first) == (1, (20,))
    assert found.absolute is not None
    assert found.absolute.size == abs(float(a[20]) - float(b[20])) > 0


def test_the_sign_of_zero_is_a_difference_of_zero() -> None:
    found = _compare(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, -0.0]))
    assert found.count == 1
    assert found.absolute is not None
    assert found.relative is not None
    assert (found.absolute.size, found.relative.size, found.absolute.index) == (0.0, 0.0, (2,))
    assert math.copysign(1, found.absolute.b) == -1


def test_nan_and_infinity_are_counted_and_kept_out_of_the_largest() -> None:
    nan, inf = math.nan, math.inf
    a = torch.tensor([nan, nan, inf, 1.0, 2.0, inf, 5.0, nan])
    b = torch.tensor([nan, 1.0, -inf, inf, 2.5, inf, 5.0, inf])
    found = _compare(a, b)
    assert (found.count, found.nan, found.infinite) == (5, (3, 1), (2, 4))
    assert found.absolute is not None
    assert (found.absolute.size, found.absolute.index) == (0.5, (4,))


def test_nothing_is_the_largest_where_only_nan_differs() -> None:
    found = _compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]))
    assert (found.count, found.first, found.absolute, found.relative) == (1, (1,), None, None)
    assert found.nan == (0, 1)


def test_nan_equals_nan_with_the_same_bits_only() -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00001, -0x400000], dtype=torch.int32)
    a = bits.view(torch.float32)
    assert _compare(a, a.clone()).count == 0
    assert _compare(a, bits.roll(1).view(torch.float32)).count == 3


@pytest.mark.parametrize("dtype", [*FLOATS[:4], torch.float8_e5m2], ids=str)
def test_nan_and_infinity_are_counted_in_equal_tensors_too(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, math.nan, math.inf, -math.inf, 2.0]).to(dtype)
    found = _compare(a, a.clone())
    assert (found.count, found.nan, found.infinite) == (0, (1, 1), (2, 2))


def test_float8_e4m3_has_a_nan_and_large_values_are_none() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    found = _compare(codes.view(torch.float8_e4m3fn), codes.view(torch.float8_e4m3fn))
    assert (found.nan, found.infinite) == ((2, 2), (0, 0))


def test_a_sum_that_overflows_is_no_infinity() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        large = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
        found = _compare(large, -large)
        assert (found.count, found.nan, found.infinite) == (9, (0, 0), (0, 0))
        assert found.absolute is not None
        assert math.isfinite(found.absolute.size)


class TestOtherDtype:
    @pytest.mark.parametrize(
        ("narrow", "wide"),
        [(n, w) for n, w in itertools.combinations(reversed(FLOATS), 2) if n.itemsize < w.itemsize],
        ids=str,
    )
    def test_a_widening_loses_nothing(self, narrow: torch.dtype, wide: torch.dtype) -> None:
        # float16 cannot hold all that float8_e5m2's and bfloat16's neighbours can, small values it can.
        a = _values(narrow, 40)
        assert _compare(a, a.to(torch.float64).to(wide)).count == 0
        assert _compare(a.to(torch.float64).to(wide), a).count == 0

    def test_a_rounding_loses_what_numpy_says(self) -> None:
        a = _values(torch.float32, 6, 11)
        found = _compare(a, a.half())
        expected = np.abs(a.numpy().astype(np.float64) - a.numpy().astype(np.float16).astype(np.float64))
        assert found.count == np.count_nonzero(expected)
        assert found.absolute is not None
        assert found.absolute.size == expected.max()
        assert found.absolute.index == np.unravel_index(expected.argmax(), expected.shape)

    def test_two_formats_of_16_bits_meet_in_fp32(self) -> None:
        a = torch.tensor([1.0, 1.5, 65504.0, 1 + 2**-10])
        found = _compare(a.half(), a.bfloat16())
        assert found.count == 2
        assert found.absolute is not None
        assert (found.absolute.size, found.absolute.index) == (32.0, (2,))

    def test_the_sign_of_zero_survives(self) -> None:
        a = torch.tensor([-0.0, 0.0])
        assert _compare(a.bfloat16(), a).count == 0
        assert _compare(a.bfloat16(), -a).count == 2

    def test_integers_beyond_float64_do_not_pass_for_their_neighbours(self) -> None:
        a = torch.tensor([3, 2**53, 2**53 + 1])
        found = _compare(a, torch.tensor([3.0, 2.0**53, 2.0**53], dtype=torch.float64))
        assert (found.count, found.first) == (1, (2,))

    def test_integers_of_two_sizes(self) -> None:
        a = torch.tensor([1, -1, 127], dtype=torch.int8)
        assert _compare(a, a.long()).count == 0
        assert _compare(a, torch.tensor([1, 255, 127], dtype=torch.uint8)).first == (1,)


class TestStacks:
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["in order", "mixed"])
    def test_elements_add_up_to_the_whole(self, order: tuple[int, ...]) -> None:
        a = _values(torch.bfloat16, 3, 4, 5)
        b = torch.where(torch.rand(3, 4, 5) < 0.3, a + 1, a)
        a[1, 2, 3] = math.nan
        comparison = Comparison((3, 4, 5))
        for at in order:
            comparison.add(a[at], b[at], (at,))
        assert comparison.result() == _compare(a, b)

    def test_the_first_of_equal_sizes_counts_whatever_the_order(self) -> None:
        a = torch.zeros(3, 2)
        comparison = Comparison((3, 2))
        for at in (2, 1):
            comparison.add(a[at], a[at] + 1, (at,))
        found = comparison.result()
        assert found.first == (1, 0)
        assert found.absolute is not None
        assert found.absolute.index == (1, 0)


def test_views_and_numbers_and_nothing() -> None:
    a = _values(torch.float32, 4, 6)
    assert _compare(a.t(), a.t().contiguous()).count == 0
    b = a.clone()
    b[1, 2] += 1
    found = _compare(a.t(), b.t())
    assert found.first == (2, 1)
    assert _compare(torch.tensor(1.0), torch.tensor(2.0)).first == ()
    assert _compare(torch.empty(0, 3), torch.empty(0, 3)).total == 0
