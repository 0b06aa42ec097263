"""Compares two tensors: first the bits, then the values in float64, a few megabytes at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_fp32.weights.tensors import FLOAT4, info_of

Index = tuple[int, ...]

_CHUNK = 1 << 18
"""Number of values that are compared at once, so that they fit into caches in float64."""

_SMALLEST = 5e-324
"""The smallest positive float64."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_EXPONENT_OF_8_BITS = 0x7C
"""The smallest code of float8_e5m2 that is infinite or NaN. Of float8_e4m3fn, only the largest code is NaN."""

_WITH_SUCH_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of float4 by code; the highest of the four bits is the sign (OCP Microscaling Formats, section 5.3.3)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest difference of two values, and its place."""

    size: float
    index: Index
    """Index in the tensor. If several differences are equally large, the first in row-major order."""
    a: float
    b: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueDifference:
    """How the values of two tensors with one shape differ.

    Two values are equal if their bits are equal in a dtype that holds both. So 0.0 and -0.0 differ (by 0), and two NaNs
    are equal if their bits are equal.
    """

    count: int
    """Number of values that differ."""
    total: int
    """Number of values in each tensor."""
    first: Index | None
    """Index of the first value that differs, in row-major order. None if all values are equal."""
    absolute: Largest | None
    """The largest |a - b| in float64. None if no two finite values differ, and for complex values."""
    relative: Largest | None
    """The largest |a - b| / max(|a|, |b|) in float64, from 0 to 2."""
    nan: tuple[int, int]
    """Number of NaN values in a and in b, whether they differ or not. A complex value is NaN if a part of it is."""
    infinite: tuple[int, int]
    """Number of infinite values in a and in b, whether they differ or not."""


class Comparison:
    """Compares two tensors, either whole or, for stacks, element by element in any order.

    Args:
        shape: shape of the whole tensor, counted in values (`TensorInfo.shape`).
    """

    def __init__(self, shape: Index) -> None:
        self._shape = shape
        self._count = 0
        self._first: Index | None = None
        self._absolute: Largest | None = None
        self._relative: Largest | None = None
        self._nan = [0, 0]
        self._infinite = [0, 0]

    def add(self, a: Tensor, b: Tensor, index: Index = ()) -> None:
        """Compare two tensors with one shape, or element `index` of two stacks. Their dtypes may differ."""
        shapes = [info_of(tensor.dtype, tensor.shape).shape for tensor in (a, b)]
        assert shapes[0] == shapes[1] == self._shape[len(index) :], (shapes, self._shape, index)
        for start, first, second in _chunks(a, b):
            is_finite = self._count_non_finite(0, first)
            is_equal = first.dtype == second.dtype and torch.equal(_bits(first), _bits(second))
            is_finite &= self._count_non_finite(1, first if is_equal else second)
            if not is_equal:
                self._measure(first, second, start, index, is_finite=is_finite)

    def result(self) -> ValueDifference:
        """The differences of all tensors that were added."""
        return ValueDifference(
            count=self._count,
            total=math.prod(self._shape),
            first=self._first,
            absolute=self._absolute,
            relative=self._relative,
            nan=(self._nan[0], self._nan[1]),
            infinite=(self._infinite[0], self._infinite[1]),
        )

    def _measure(self, a: Tensor, b: Tensor, start: int, index: Index, *, is_finite: bool) -> None:
        differs = _differs(a, b)
        count = int(differs.count_nonzero())
        self._count += count
        if not count:
            return
        if self._first is None or self._place(start, index) < self._first:
            first = self._place(start + int(differs.int().argmax()), index)
            self._first = first if self._first is None else min(self._first, first)
        if a.is_complex() or b.is_complex():
            return
        x, y = a.double(), b.double()
        absolute = (x - y).abs_()
        if torch.float64 in (a.dtype, b.dtype):
            # The difference of two finite values may be infinite, which JSON cannot express.
            absolute.clamp_(max=torch.finfo(torch.float64).max)
        relative = absolute / torch.maximum(x.abs(), y.abs()).clamp_(min=_SMALLEST)
        usable = differs if is_finite else differs & x.isfinite() & y.isfinite()
        self._absolute = self._larger(self._absolute, absolute, usable, (x, y), start, index)
        self._relative = self._larger(self._relative, relative, usable, (x, y), start, index)

    def _larger(
        self,
        known: Largest | None,
        sizes: Tensor,
        usable: Tensor,
        values: tuple[Tensor, Tensor],
        start: int,
        index: Index,
    ) -> Largest | None:
        size = float(sizes.max())
        # Most chunks end here. If `size` is NaN, this comparison is False.
        if known is not None and size < known.size:
            return known
        sizes = torch.where(usable, sizes, -1.0)
        at = int(sizes.argmax())
        size = float(sizes[at])
        if size < 0:
            return known
        place = self._place(start + at, index)
        # Elements come in any order. Of equal differences, the first in the tensor counts.
        if known is not None and (size, known.index) <= (known.size, place):
            return known
        return Largest(size=size, index=place, a=float(values[0][at]), b=float(values[1][at]))

    def _count_non_finite(self, side: int, values: Tensor) -> bool:
        """Count NaN and infinite values, and return whether all values are finite."""
        if not _may_be_non_finite(values):
            return True
        wide = values.to(torch.complex128) if values.is_complex() else values.double()
        nan, infinite = int(wide.isnan().sum()), int(wide.isinf().sum())
        self._nan[side] += nan
        self._infinite[side] += infinite
        return not (nan or infinite)

    def _place(self, position: int, index: Index) -> Index:
        return (*index, *_unravel(position, self._shape[len(index) :]))


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(position of the first value, values of a, values of b) for consecutive pieces of the flat tensors."""
    flat_a, flat_b = a.detach().contiguous().view(-1), b.detach().contiguous().view(-1)
    (count,) = info_of(flat_a.dtype, flat_a.shape).shape
    for start in range(0, count, _CHUNK):
        yield start, _part(flat_a, start), _part(flat_b, start)


def _part(flat: Tensor, start: int) -> Tensor:
    """Values from `start` on. float4 values are returned in fp32; a byte has two, in its lower half first."""
    if flat.dtype != FLOAT4:
        return flat[start : start + _CHUNK]
    codes = flat[start // 2 : (start + _CHUNK) // 2].view(torch.uint8).int()
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    return table[torch.stack([codes & 15, codes >> 4], dim=-1).view(-1)]


def _bits(values: Tensor) -> Tensor:
    """The bits of each value, or of each part of a complex value, as an integer."""
    if values.is_complex():
        values = torch.view_as_real(values)
    return values.view(_INTEGERS[values.dtype.itemsize])


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """A mask of the values whose bits differ in a dtype that holds both."""
    if a.dtype == b.dtype:
        return _differing_bits(a, b)
    if a.is_complex() or b.is_complex():
        common = torch.complex128
    elif a.dtype.is_floating_point and b.dtype.is_floating_point:
        common = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    else:
        common = torch.float64 if a.dtype.is_floating_point or b.dtype.is_floating_point else torch.int64
    differs = _differing_bits(a.to(common), b.to(common))
    for values in (a, b):
        if values.dtype == torch.uint64 and common == torch.int64:
            differs |= values.view(torch.int64) < 0  # larger than any value of the other dtype
        elif values.dtype in (torch.int64, torch.uint64) and common != torch.int64:
            differs |= _is_rounded(values)
    return differs


def _differing_bits(a: Tensor, b: Tensor) -> Tensor:
    differs = _bits(a) != _bits(b)
    return differs.any(dim=-1) if a.is_complex() else differs


def _is_rounded(values: Tensor) -> Tensor:
    """A mask of the 64-bit integers that are not exact in float64."""
    wide = values.double()
    limit = 2.0**63 if values.dtype == torch.int64 else 2.0**64
    fits = wide < limit
    return ~fits | (torch.where(fits, wide, 0.0).to(values.dtype).view(torch.int64) != values.view(torch.int64))


def _may_be_non_finite(values: Tensor) -> bool:
    """Whether a value may be NaN or infinite. A sum shows this many times faster than a test of each value."""
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.dtype.is_floating_point:
        return False
    if values.dtype in _WITH_SUCH_CODES:
        return bool((values.view(torch.uint8) & 0x7F).max() >= _EXPONENT_OF_8_BITS)
    if values.dtype.itemsize == 1:
        return True
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return not math.isfinite(float(values.sum(dtype=wide)))


def _unravel(position: int, shape: Index) -> Index:
    index = []
    for size in reversed(shape):
        position, at = divmod(position, size)
        index.append(at)
    return tuple(reversed(index))
